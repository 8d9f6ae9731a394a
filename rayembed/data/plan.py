"""Which rows are in which batch, and which positive and negatives each uses: pure functions of seed, epoch and step.

No state and no dependence on workers, loader processes or what was drawn before: a resumed run asks for batch 1,000
and gets what an unbroken one got, on any number of workers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_ORDER, _CHOICE = 0, 1  # streams of random numbers that must not overlap; mixing.py has 2, labels.py 3, shuffle.py 4


class Plan(Protocol):
    """Batches of all workers together, counted from 0 over the whole training: a BatchPlan or a mixing.MixedPlan."""

    @property
    def seed(self) -> int:
        """The experiment's."""

    @property
    def num_rows(self) -> int:
        """Rows that can be in a batch."""

    @property
    def global_batch_size(self) -> int:
        """Queries of the largest batch."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch; the same in every epoch."""

    @property
    def rows_left_out(self) -> int:
        """Rows that fill no whole batch."""

    def epoch(self, batch: int) -> int:
        """The epoch, from 0, that a batch belongs to."""

    def dataset(self, batch: int) -> int:
        """Place of the dataset that a batch is of among Datasets.items."""

    def dataset_epoch(self, batch: int) -> int:
        """How often its dataset was gone through before: what choices of a row's positive and negatives depend on."""

    def rows(self, batch: int) -> NDArray[np.int64]:
        """Row numbers of one batch; worker r of W takes the r-th of W equal slices."""


@dataclass(frozen=True)
class BatchPlan:
    """Batches of all workers together, counted from 0 over the whole training."""

    num_rows: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < self.global_batch_size:
            raise ValueError(
                f"{self.num_rows} training rows do not fill one batch of {self.global_batch_size} queries; lower "
                "train.per_device_train_batch_size (or train.global_batch_size, ray.num_workers), or add rows to "
                "data.train"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass; the rows left over sit out this epoch and are drawn anew in the next."""
        return self.num_rows // self.global_batch_size

    @property
    def rows_left_out(self) -> int:
        """Rows of an epoch that fill no whole batch."""
        return self.num_rows % self.global_batch_size

    def epoch(self, batch: int) -> int:
        """The epoch, from 0, that a batch belongs to."""
        return batch // self.batches_per_epoch

    def dataset(self, batch: int) -> int:
        """Place of the dataset that a batch is of: there is one."""
        return 0

    def dataset_epoch(self, batch: int) -> int:
        """How often the rows were gone through before."""
        return self.epoch(batch)

    def rows(self, batch: int) -> NDArray[np.int64]:
        """Row numbers [global_batch_size] of one batch; worker r of W takes the r-th of W equal slices."""
        epoch, within = divmod(batch, self.batches_per_epoch)
        start = within * self.global_batch_size
        return _permutation(self.seed, epoch, self.num_rows)[start : start + self.global_batch_size]


@lru_cache(maxsize=2)  # this epoch's and, for the thread that works ahead, the next one's
def _permutation(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    rows = np.random.default_rng([seed, epoch, _ORDER]).permutation(num_rows)
    rows.setflags(write=False)  # every batch of the epoch is a view of it
    return rows


def choose_group(
    seed: int, epoch: int, row: int, *, num_pos: int, num_neg: int, group_size: int
) -> tuple[int, NDArray[np.int64]]:
    """Which positive and which negatives a row uses in an epoch.

    Args:
        seed: the experiment's.
        epoch: from 0; another epoch, another choice.
        row: row number in the training set.
        num_pos: positives of the row, at least 1.
        num_neg: negatives of the row; at least 1 where group_size is above 1.
        group_size: passages a query, the positive included.

    Returns:
        Index of the positive, and group_size - 1 indices of negatives: without repetition where there are enough, else
        each negative as often as any other, give or take one (FlagEmbedding's rule).
    """
    rng = np.random.default_rng([seed, epoch, row, _CHOICE])
    positive = int(rng.integers(num_pos))
    needed = group_size - 1
    if needed == 0:
        return positive, np.empty(0, np.int64)
    whole, rest = divmod(needed, num_neg)
    repeated = np.tile(np.arange(num_neg), whole)
    chosen = np.concatenate([repeated, rng.permutation(num_neg)[:rest]])
    return positive, rng.permutation(chosen) if whole else chosen


def total_batches(plan: Plan, *, num_train_epochs: float, max_steps: int | None, accumulation: int) -> int:
    """Batches of the whole training: a whole number of optimiser steps, at least one.

    Args:
        plan: the batches.
        num_train_epochs: passes over the rows; may be a fraction.
        max_steps: steps of the optimiser in place of epochs. None: by the epochs.
        accumulation: batches a step.
    """
    steps = max_steps or max(1, int(plan.batches_per_epoch * num_train_epochs) // accumulation)
    return steps * accumulation
