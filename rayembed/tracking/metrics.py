"""metrics.jsonl, a line a step, evaluations.jsonl, a line an evaluation, and the same figures for TensorBoard."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

EVALUATIONS = "evaluations.jsonl"


class MetricsLog:
    """Appends the figures of every step; a resumed run continues the file at its step."""

    def __init__(self, folder: Path, *, last_step: int, last_evaluation: int = -1) -> None:
        """Opens the log.

        Args:
            folder: where metrics.jsonl, evaluations.jsonl and tensorboard/ lie.
            last_step: steps done so far; lines after it come from a run that was killed and are removed. 0: a new run.
            last_evaluation: the same for evaluations. -1: there is none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _continued(folder / "metrics.jsonl", last_step).open("a")
        self._evaluations = _continued(folder / EVALUATIONS, last_evaluation)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1, write_to_disk=True)

    def write(self, figures: dict[str, float], *, dataset: str = "", alarms: Sequence[str] = ()) -> None:
        """Adds one step.

        Args:
            figures: hold its number as `step`.
            dataset: that its batches are of; several with commas between. Empty: of all together.
            alarms: names of what is wrong with it.
        """
        named: dict[str, object] = {"dataset": dataset} if dataset else {}
        named |= {"alarms": list(alarms)} if alarms else {}
        self._file.write(json.dumps({**figures, **named}) + "\n")
        self._file.flush()
        step = int(figures["step"])
        for name, value in figures.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, step)

    def write_evaluation(self, line: dict[str, Any]) -> None:
        """Adds an evaluation: `step` is its number, `eval` its figures."""
        with self._evaluations.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line["eval"].items():
            self._board.add_scalar(f"eval/{_on_board(name)}", value, line["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def _on_board(name: str) -> str:
    """A figure's name as TensorBoard allows it: ndcg@10 is ndcg_10 there."""
    return name.replace("@", "_")


def _continued(path: Path, last_step: int) -> Path:
    """The same file without what comes after a step, if there is one."""
    if path.exists():
        path.write_text("".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= last_step))
    return path


def _whole_lines(path: Path) -> list[str]:
    """Lines that end; a killed process may have left half of one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
