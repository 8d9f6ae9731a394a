"""Between two steps: evaluations, checkpoints, and whether training ends; the same on all workers."""

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rayembed.config import Experiment
from rayembed.data.storage import write_atomic
from rayembed.tracking.metrics import MetricsLog
from rayembed.training.leaving import LeftError
from rayembed.training.meter import Meter
from rayembed.training.saves import Saves
from rayembed.training.validation import Place, Validation

if TYPE_CHECKING:
    from rayembed.training.engine import Engine
    from rayembed.training.loop import Worker

BEFORE_ANY = -1  # step of an evaluation that was not done
State = dict[str, Any]

logger = logging.getLogger("rayembed")


class Report(Protocol):
    """Takes a checkpoint; called by all workers at the same steps."""

    def __call__(self, engine: "Engine", state: State, loss: float, figures: dict[str, float] | None, /) -> None:
        """Saves.

        Args:
            engine: what is saved.
            state: {"step": steps done, "course": of evaluations}.
            loss: the mean since the checkpoint before.
            figures: of the evaluation of this step. None: it is not evaluated.
        """


class Told(Protocol):
    """Takes the figures of an evaluation; called by all workers at the same steps."""

    def __call__(self, figures: dict[str, float], /) -> None:
        """Of a step without a checkpoint."""


def told_nobody(figures: dict[str, float], /) -> None:
    """Of no interest to anybody."""


def no_checkpoint(step: int, /) -> AbstractContextManager[Path]:
    """Where none are kept."""
    raise FileNotFoundError(f"no checkpoint of step {step} is kept")


def last_evaluation(found: State) -> int:
    """The step of the last one that the state of a checkpoint knows of; -1 where there is none."""
    return int(found["course"]["evaluated"]) if "course" in found else BEFORE_ANY


@dataclass
class Course:
    """The evaluations so far: which was the best, and how many came since."""

    of: str
    """What figures are of; those of others are not compared."""

    evaluated: int = BEFORE_ANY
    """Step of the last one."""

    best_step: int = BEFORE_ANY
    best: float = -math.inf
    without_better: int = 0

    @classmethod
    def resumed(cls, state: State | None, of: str) -> "Course":
        """That of a checkpoint, if it is of the same data and metric."""
        return cls(**state) if state is not None and state["of"] == of else cls(of)

    def add(self, step: int, figure: float) -> bool:
        """Takes an evaluation, and says whether it is the best so far; of equal ones the first is."""
        better = figure > self.best
        self.evaluated = step
        self.without_better = 0 if better else self.without_better + 1
        if better:
            self.best_step, self.best = step, figure
        return better

    def state(self) -> State:
        """For a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Pauses:
    """What one worker does between its steps."""

    def __init__(
        self,
        experiment: Experiment,
        worker: "Worker",
        engine: "Engine",
        checkpoint: Report,
        log: MetricsLog | None,
        *,
        found: State,
        total_steps: int,
    ) -> None:
        """Goes on where a checkpoint left off.

        Args:
            experiment: its section train says when to evaluate and to save.
            worker: this one.
            engine: around the model.
            checkpoint: takes checkpoints.
            log: of worker 0. None: of the others.
            found: state of the checkpoint, or {"step": 0}.
            total_steps: after which training ends.
        """
        assert experiment.train is not None
        self._config, self._engine, self._worker = experiment.train, engine, worker
        self._checkpoint, self._log = checkpoint, log
        self.step: int = found["step"]
        """Steps done before this worker's first one."""

        self.total_steps = total_steps
        self.saves = Saves(experiment.train, rank=worker.rank, notice=worker.notice)
        self.meter = Meter(worker.device)
        self._validation: Validation | None = None
        if worker.dev is not None:
            place = Place(worker.rank, worker.world_size, worker.device)
            self._validation = Validation.of(experiment, engine, worker.dev, place)
        name = "" if self._validation is None else self._validation.split.name
        self.course = Course.resumed(found.get("course"), f"{experiment.train.metric_for_best_model} on {name}")

    def at(self, step: int, flags: Sequence[bool] = ()) -> bool:
        """Evaluates and saves where it is due.

        Args:
            step: steps done.
            flags: what any worker said, see Saves. Empty: no step was done since the last call, or since the start.

        Returns:
            Whether training ends here.

        Raises:
            LeftError: a worker was asked to leave by SIGTERM; a checkpoint was made before.
        """
        before_last = step < self.total_steps
        due = bool(flags) and self.saves.due(step, flags) and before_last
        if due and self.saves.hurried:  # before an evaluation, which may take minutes
            self._save(step, None)
            if flags[0]:
                raise LeftError(f"a worker got SIGTERM and left; the checkpoint of step {step} was saved before")
            due = False
        every = self._config.eval_steps
        if self._validation is None or every is None or step == self.course.evaluated or (step % every and before_last):
            if due:
                self._save(step, None)
            return False
        figures, better = self._evaluate(step)
        ends = self._ends
        if (due or (better and step and self._config.keeps_by_metric)) and before_last and not ends:
            self._save(step, figures)
        else:
            self._worker.told({"step": step, **figures})
        self.meter.restart()
        return ends

    @property
    def _ends(self) -> bool:
        patience = self._config.early_stopping_patience
        return patience is not None and self.course.without_better >= patience

    @property
    def written_step(self) -> int | None:
        """The step whose weights are the result. None: those that the engine has now."""
        course = self.course
        best = self._config.load_best_model_at_end and course.best_step != course.evaluated
        return course.best_step if best else None

    def _save(self, step: int, figures: dict[str, float] | None) -> None:
        state = {"step": step} | ({} if self._validation is None else {"course": self.course.state()})
        self._checkpoint(self._engine, state, self.saves.mean_loss(), figures)

    def _evaluate(self, step: int) -> tuple[dict[str, float], bool]:
        """Figures, and whether they are the best so far."""
        assert self._validation is not None
        start = time.monotonic()
        known = self._worker.base_figures if step == 0 else None
        figures = known or self._validation.figures()
        if step == 0 and known is None and self._worker.base is not None and self._log is not None:
            write_atomic(self._worker.base, json.dumps(figures).encode())
        metric, course = self._config.metric_for_best_model, self.course
        better = course.add(step, figures[metric])
        if self._log is not None:
            self._write(step, figures, better=better, seconds=time.monotonic() - start)
        return figures, better

    def _write(self, step: int, figures: dict[str, float], *, better: bool, seconds: float) -> None:
        assert self._validation is not None
        assert self._log is not None
        config, course, split = self._config, self.course, self._validation.split
        metric, over = config.metric_for_best_model, self._ends or step == self.total_steps
        written = self.written_step
        line = {"step": step, "eval": figures, "metric": metric, "of": split.words, **split.counts, "seconds": seconds}
        line |= {"stopped_early": True} if self._ends and step < self.total_steps else {}
        line |= {"model_step": step if written is None else written} if over else {}
        self._log.write_evaluation(line)
        best = "the best so far" if better else f"the best was {course.best:.4f} at step {course.best_step}"
        logger.info(
            "train: %s %.4f at step %d (%s; %s; %.1f s)", metric, figures[metric], step, best, split.words, seconds
        )
        if "stopped_early" in line:
            logger.info(
                "train: ends after step %d of %d: %d evaluations in succession without a better %s "
                "(train.early_stopping_patience)",
                *(step, self.total_steps, course.without_better, metric),
            )
        if over and written is not None:
            which = f"that of step {written}" if written else "the base model itself, which no step was better than,"
            logger.info(
                "train: the model that is written is %s with %s %.4f (train.load_best_model_at_end)",
                *(which, metric, course.best),
            )
