"""Trials of a sweep on disk: what each tries, and what came of it.

All that a sweep knows lies in OUTPUT_DIR/tune/trials/NAME, a run folder with two files more: trial.json before it
starts, result.json when it has ended. So a sweep is gone on with from its folders alone, whatever was killed, and needs
no state of Ray Tune's (whose Tuner.restore wants the same code, space and number of samples again). NAME follows from
the values, so that the same point is never trained twice.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rayembed.config.space import Point
from rayembed.config.uris import public_text
from rayembed.data import mirror
from rayembed.data.storage import fingerprint, working_folder, write_atomic, write_changed
from rayembed.jobs.folders import ChangedError

FOLDER = "trials"
TRIAL, RESULT, FAILURE = "trial.json", "result.json", "failure.json"
EVALUATIONS = "evaluations.jsonl"  # of the job train
Status = Literal["done", "stopped early", "failed"]


@dataclass(frozen=True)
class Failure:
    """Why a trial has no model."""

    error: str

    again: bool
    """Whether the next call of the same sweep tries it again: it was lost, which says nothing about its values."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a trial."""

    status: Status
    seconds: float
    """Of its last start, until it ended."""

    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """Steps and figures, in their order; step 0 is the base model."""

    failure: Failure | None = None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and figure of the best evaluation of a model that was trained; the earliest of equal ones."""
        trained = [found for found in self.evaluations if found[0] > 0]
        return max(trained, key=lambda found: (found[1], -found[0]), default=None)


@dataclass(frozen=True)
class Trial:
    """One point of the space."""

    number: int
    """Counted from 0, in the order in which the points were chosen."""

    values: Point
    """By dotted keys."""

    baseline: bool = False
    """Whether it is the experiment as it is."""

    result: Result | None = None
    """None: not ended."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return name_of(self.values)

    @property
    def changed(self) -> Point:
        """What it sets: nothing, of the experiment as it is (where a section that is off has no values to be set)."""
        return {} if self.baseline else self.values


def name_of(point: Point) -> str:
    """Name of a point's trial: 16 hex digits of its values."""
    return fingerprint(point)


def trial_folder(tune_folder: Path, name: str) -> Path:
    """Where a trial lies."""
    return tune_folder / FOLDER / name


def is_refused(error: Exception) -> bool:
    """Whether a trial's own settings are refused; what was changed since it began can be set back."""
    return isinstance(error, ValueError) and not isinstance(error, ChangedError)


def known_trials(tune_folder: Path) -> list[Trial]:
    """All trials that were ever begun, by their numbers."""
    return sorted(
        (read_trial(path.parent) for path in (tune_folder / FOLDER).glob(f"*/{TRIAL}")), key=lambda own: own.number
    )


def read_trial(folder: Path) -> Trial:
    """The trial of a folder, with its result if it has ended."""
    told = json.loads(mirror.here(folder / TRIAL).read_text())
    found = _read(folder / RESULT)
    return Trial(told["number"], told["values"], told["baseline"], None if found is None else _result(found))


def begin(tune_folder: Path, trial: Trial) -> None:
    """Notes the trial before it starts, and forgets how an earlier start of it ended."""
    folder = trial_folder(tune_folder, trial.name)
    for name in (RESULT, FAILURE):
        if (folder / name).exists():
            mirror.remove(folder / name)
    told = {"number": trial.number, "values": trial.values, "baseline": trial.baseline}
    write_changed(folder / TRIAL, json.dumps(told, indent=1).encode())


def forget_failure(folder: Path) -> None:
    """Removes what an earlier try of a trial left, which another machine may have written."""
    if mirror.is_there(folder / FAILURE):
        mirror.remove(folder / FAILURE)


def note_failure(folder: Path, failure: Failure) -> None:
    """Leaves a word of why, for the process that ends the trial; of one that is lost there is none."""
    own = replace(failure, error=public_text(failure.error))
    write_atomic(folder / FAILURE, json.dumps(asdict(own)).encode())


def end(tune_folder: Path, trial: Trial, *, metric: str, seconds: float, lost: bool = False) -> Trial:
    """Writes what came of a trial, from what it left in its folder.

    Args:
        tune_folder: of the sweep.
        trial: that has ended.
        metric: of its evaluations.
        seconds: that it took.
        lost: its process ended by an error.
    """
    folder = trial_folder(tune_folder, trial.name)
    mirror.refresh(folder)  # other processes wrote it, maybe on other machines
    told = _read(folder / FAILURE)
    failure = None if told is None else Failure(**told)
    if lost and failure is None:
        failure = Failure("its process was lost: a node, or its memory (see the logs of Ray)", again=True)
    status: Status = "done" if (folder / "train").is_dir() else "stopped early"
    result = Result(
        status="failed" if failure is not None else status,
        seconds=round(seconds, 1),
        evaluations=evaluations(folder, metric),
        failure=failure,
    )
    write_atomic(folder / RESULT, json.dumps(asdict(result)).encode())
    return replace(trial, result=result)


def evaluations(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Steps and figures of a trial's evaluations, those of its unfinished training too."""
    train = folder / "train"
    path = (train if train.is_dir() else working_folder(train)) / EVALUATIONS
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # a killed one's last
    found = {int(line["step"]): float(line["eval"][metric]) for line in map(json.loads, lines)}
    return sorted(found.items())


def _result(found: Mapping[str, Any]) -> Result:
    failure = found["failure"] and Failure(**found["failure"])
    return Result(
        **{**found, "evaluations": [(step, figure) for step, figure in found["evaluations"]], "failure": failure}
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found
