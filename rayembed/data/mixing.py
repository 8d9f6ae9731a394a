"""Batches of one dataset each, mixed: which dataset is next, and which of its batches, as pure functions.

Every dataset goes through passes of its own, one after the other; the k-th batch of a dataset is a matter of seed, name
and k alone. (FlagEmbedding shuffles in place, so that its order depends on what was drawn before and is lost when a run
is resumed; which rows share a batch therefore differs from it, by intent.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.wording import counted
from rayembed.data.datasets import Dataset, Datasets
from rayembed.data.passes import Bucket, Pass, Rows, TextKeys, buckets_of, one_pass
from rayembed.data.plan import BatchPlan, Plan
from rayembed.data.store import hash_text

_ORDER, _MIXING = 0, 2  # streams of random numbers that must not overlap; see plan.py
KEPT = 2  # passes of a dataset that are remembered: this one and, for the thread that works ahead, the next


class _Turn(NamedTuple):
    dataset: int
    pass_number: int
    batch: int


@dataclass(frozen=True, eq=False)
class MixedPlan:
    """As BatchPlan, with each batch of one dataset."""

    data: Datasets
    config: DataConfig
    """How they are mixed."""

    seed: int

    lengths: NDArray[np.int32] | None = None
    """[N] tokens of the longest text of each row. None: rows are not grouped by length."""

    keys: TextKeys | None = None
    """No text is in a batch twice. None: it may be."""

    _passes: dict[tuple[int, int], Pass] = field(default_factory=dict, init=False, repr=False)
    _sequences: dict[int, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.config.length_grouping and self.lengths is None:
            raise ValueError("data.length_grouping needs the lengths of the rows")
        if not sum(self.batches):
            sizes = ", ".join(f"{item.name or 'all'}: {counted(item.num_rows, 'row')}" for item in self.data.items)
            alone = "" if self.keys is None else " without a text twice (data.no_duplicates_within_batch)"
            raise ValueError(
                f"no dataset fills one batch{alone} ({sizes}; batches of {self.global_batch_size} queries); lower "
                "train.per_device_train_batch_size (or train.global_batch_size, ray.num_workers, or the batch_size in "
                "data.datasets), or add rows to data.train"
            )

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """Whole batches in one pass over each dataset; in the first one, where texts must not be in a batch twice."""
        return tuple(number for number, _ in self._first)

    @cached_property
    def _first(self) -> list[tuple[int, int]]:
        """Batches, and rows in them, of the first pass over each dataset."""
        passes = (self._pass(i, 0) for i in range(len(self.data.items)))
        return [(len(found.starts), int((found.stops - found.starts).sum())) for found in passes]

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Batches of each dataset in an epoch."""
        some = [i for i, number in enumerate(self.batches) if number]
        found = shares(
            [self.batches[i] for i in some],
            [self.data.items[i].weight for i in some],
            mixing=self.config.mixing,
            temperature=self.config.mixing_temperature,
        )
        numbers = dict(zip(some, found, strict=True))
        return tuple(numbers.get(i, 0) for i in range(len(self.batches)))

    @property
    def batches_per_epoch(self) -> int:
        """Batches of all datasets in an epoch."""
        return sum(self.shares)

    @property
    def num_rows(self) -> int:
        """Rows that can be in a batch."""
        return sum(item.num_rows for item in self.data.items)

    @property
    def rows_left_out(self) -> int:
        """Rows that are in no batch of the first pass over their dataset."""
        return sum(self.left_out(i) for i in range(len(self.data.items)))

    @property
    def global_batch_size(self) -> int:
        """Queries of the largest batch."""
        return max(size for item in self.data.items for _, size in item.batch_sizes)

    def left_out(self, dataset: int) -> int:
        """Rows of a dataset that are in no batch of the first pass over it."""
        return self.data.items[dataset].num_rows - self._first[dataset][1]

    def epoch(self, batch: int) -> int:
        """The epoch, from 0, that a batch belongs to."""
        return batch // self.batches_per_epoch

    def dataset(self, batch: int) -> int:
        """Place in data.items of the dataset that a batch is of."""
        return self._turn(batch).dataset

    def dataset_epoch(self, batch: int) -> int:
        """How many passes over its dataset came before the one that a batch belongs to."""
        return self._turn(batch).pass_number

    def rows(self, batch: int) -> NDArray[np.int64]:
        """Row numbers of one batch; worker r of W takes the r-th of W equal slices."""
        turn = self._turn(batch)
        found = self._pass(turn.dataset, turn.pass_number)
        if not len(found.starts):  # no batch without a text twice, though the first pass has one
            found = self._pass(turn.dataset, 0)
        place = turn.batch % len(found.starts)  # a pass with fewer batches than the first repeats its first ones
        return found.rows[found.starts[place] : found.stops[place]].astype(np.int64)

    def notes(self) -> list[str]:
        """A line for each dataset: its rows, batches and share, and what is left out."""
        lines = []
        for i, item in enumerate(self.data.items):
            left = self.left_out(i)
            lines.append(
                f"dataset {item.name or 'of all rows'}"
                + (f" (type {item.type})" if item.type else "")
                + f": {counted(item.num_rows, 'row')}, {counted(self.batches[i], 'batch')} a pass, "
                f"{self.shares[i]:,} of {counted(self.batches_per_epoch, 'batch')} an epoch, of "
                f"{counted(item.batch_size, 'query')} x {item.group_size} passages, "
                f"{item.loss}{', without in-batch negatives' if item.no_in_batch_neg else ''}"
                + (f"; {counted(left, 'row')} of a pass in no batch" if left else "")
                + (f"; {counted(item.left_out, 'row')} alone with their label left out" if item.left_out else "")
            )
        return lines

    def _turn(self, batch: int) -> _Turn:
        epoch, within = divmod(batch, self.batches_per_epoch)
        datasets, turns = self._sequence(epoch)
        dataset = int(datasets[within])
        pass_number, place = divmod(epoch * self.shares[dataset] + int(turns[within]), self.batches[dataset])
        return _Turn(dataset, pass_number, place)

    def _sequence(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The dataset of each batch of an epoch, and how many of that dataset came before it in the epoch."""
        if epoch not in self._sequences:
            datasets = np.repeat(np.arange(len(self.shares), dtype=np.int32), self.shares)
            turns = np.concatenate([np.arange(number) for number in self.shares])
            if self.config.mixing == "round_robin":
                order = np.lexsort((datasets, (turns + 0.5) / np.array(self.shares)[datasets]))
                datasets = datasets[order]
            else:
                datasets = np.random.default_rng([self.seed, epoch, _MIXING]).permutation(datasets)
            places = np.empty_like(turns)
            places[np.argsort(datasets, kind="stable")] = turns
            _remember(self._sequences, epoch, (datasets, places), [old for old in self._sequences if old != epoch])
        return self._sequences[epoch]

    def _pass(self, dataset: int, number: int) -> Pass:
        key = (dataset, number)
        found = self._passes.get(key)
        if found is None:
            name = self.data.items[dataset].name
            rng = np.random.default_rng([self.seed, number, _ORDER, hash_text(name)])
            found = one_pass(rng, self._buckets[dataset], lengths=self.lengths, keys=self.keys)
            _remember(self._passes, key, found, [old for old in self._passes if old[0] == dataset])
        return found

    @cached_property
    def _buckets(self) -> list[list[Bucket]]:
        of_row = self.data.dataset_of_row
        order: Rows = np.argsort(of_row, kind="stable")
        if len(of_row) < 2**31:
            order = order.astype(np.int32)  # half the memory
        bounds = np.searchsorted(of_row[order], np.arange(len(self.data.items) + 1))
        return [
            buckets_of(order[bounds[i] : bounds[i + 1]], item.batch_sizes, self.lengths)
            for i, item in enumerate(self.data.items)
        ]


def _remember(kept: dict[Any, Any], key: object, value: object, others: list[Any]) -> None:
    """Keeps a value, and of others like it only the latest."""
    kept[key] = value
    for old in others[: len(others) + 1 - KEPT]:
        kept.pop(old, None)


def shares(batches: Sequence[int], weights: Sequence[float], *, mixing: str, temperature: float) -> list[int]:
    """Batches of each dataset in an epoch, at least one; together as many as there are, weights applied.

    Args:
        batches: whole batches of a pass over each dataset, at least 1.
        weights: of each dataset.
        mixing: data.mixing.
        temperature: data.mixing_temperature.
    """
    weighted = np.array(batches) * np.array(weights)
    total = int(weighted.sum() + 0.5)
    parts = {"temperature": weighted ** (1 / temperature), "round_robin": np.array(weights)}.get(mixing)
    targets = weighted if parts is None else total * parts / parts.sum()
    found = np.maximum(1, np.floor(targets + 1e-9)).astype(int)
    missing = max(0, total - int(found.sum()))
    found[np.argsort(found - targets, kind="stable")[:missing]] += 1
    return [int(number) for number in found]


def batch_plan(
    data: Datasets,
    experiment: Experiment,
    *,
    lengths: NDArray[np.int32] | None = None,
    keys: TextKeys | None = None,
) -> Plan:
    """The batches of an experiment.

    Args:
        data: the datasets of its rows.
        experiment: sections data and train.
        lengths: [N] tokens of each row's longest text (TokenStore.lengths). None: only without data.length_grouping.
        keys: texts of the rows (TextKeys.of). None: only without data.no_duplicates_within_batch.

    Raises:
        ValueError: the rows fill no batch.
    """
    config = experiment.data
    if config.no_duplicates_within_batch and keys is None:
        raise ValueError("data.no_duplicates_within_batch needs the texts of the rows")
    if is_plain(data, config):
        return BatchPlan(data.items[0].num_rows, data.items[0].batch_size, experiment.seed)
    return MixedPlan(
        data,
        config,
        experiment.seed,
        lengths=lengths if config.length_grouping else None,
        keys=keys if config.no_duplicates_within_batch else None,
    )


def is_plain(data: Datasets, config: DataConfig) -> bool:
    """Whether all rows are in the same batches, whatever they hold."""
    whole: Dataset = data.items[0]
    return whole.name == "" and not config.length_grouping and not config.no_duplicates_within_batch
