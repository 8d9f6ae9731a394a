"""When a checkpoint is due: every few steps, every few minutes, and when a worker or its machine is about to go.

Clocks and signals differ between workers, so each says what it knows in the meter's all-reduce, and all do the same.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence

from rayembed.config.train import TrainConfig
from rayembed.training.leaving import asked_to_leave

NOTICE_SECONDS = 10.0  # between questions to Ray whether a machine is about to be taken away: each is a barrier


def never() -> bool:
    """Of no worker is any machine taken away."""
    return False


class Saves:
    """Decides at the end of each step."""

    def __init__(
        self,
        train: TrainConfig,
        *,
        rank: int,
        notice: Callable[[], bool] = never,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the minutes.

        Args:
            train: save_steps and save_minutes.
            rank: worker 0's clock counts for all.
            notice: whether the machine of any worker will be taken away; all workers call it at the same steps.
            clock: seconds.
        """
        self._train, self._clock_counts, self._notice, self._clock = train, rank == 0, notice, clock
        self._saved, self._noticed = clock(), False
        self.hurried = False
        """Whether what was due last cannot wait: a worker or its machine is about to go."""

        self._asked: float | None = None
        self._losses: list[float] = []

    def add(self, loss: float) -> None:
        """Takes the loss of a step."""
        self._losses.append(loss)

    def mean_loss(self) -> float:
        """Over the steps since it was asked for last: since the last checkpoint; not a number where there are none."""
        found = sum(self._losses) / len(self._losses) if self._losses else math.nan
        self._losses = []
        return found

    def flags(self) -> tuple[bool, bool, bool]:
        """What this worker says: it has to leave; the minutes are over; Ray is to be asked."""
        now, minutes = self._clock(), self._train.save_minutes
        over = minutes is not None and now - self._saved >= 60 * minutes
        ask = not self._noticed and (self._asked is None or now - self._asked >= NOTICE_SECONDS)
        return asked_to_leave(), self._clock_counts and over, self._clock_counts and ask

    def due(self, step: int, flags: Sequence[bool]) -> bool:
        """Whether to save now.

        Args:
            step: steps done.
            flags: what any worker said.
        """
        leave, over, ask = flags
        self.hurried = leave
        if ask:
            self._asked = self._clock()
            if self._notice() and not self._noticed:
                self._noticed = self.hurried = over = True
                logging.getLogger("rayembed").warning(
                    "train: a machine of this run is about to be taken away; saving a checkpoint after step %d", step
                )
        due = leave or over or step % self._train.save_steps == 0
        if due:
            self._saved = self._clock()
        return due
