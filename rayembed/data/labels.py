"""Positives and negatives of labelled texts: other rows of the same dataset, drawn by seed, epoch and row."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rayembed.data.datasets import Datasets
from rayembed.data.tasks import CLASS

_LABELLED = 3  # stream of random numbers; plan.py has 0 and 1, mixing.py 2


@dataclass(frozen=True)
class LabelIndex:
    """Labelled rows, sorted so that the rows of a dataset, and in it those of a label, are next to one another."""

    rows: NDArray[np.int64]
    """[M] row numbers; within a label ascending."""

    label_of_row: NDArray[np.int32]
    """[N] label of every training row; -1: none."""

    starts: NDArray[np.int64]
    """[L + 1] where each label begins in `rows`."""

    dataset_bounds: NDArray[np.int64]
    """[L, 2] where the dataset of each label begins and ends in `rows`."""

    @classmethod
    def of(cls, datasets: Datasets) -> Self:
        """Sorts the rows that are of type class and in a batch."""
        kinds = np.array([item.type == CLASS for item in datasets.items], np.bool_)
        dataset = datasets.dataset_of_row
        rows = np.flatnonzero((dataset >= 0) & kinds[dataset] & (datasets.labels >= 0))
        labels = datasets.labels[rows]
        rows = rows[np.lexsort((rows, labels, dataset[rows]))]
        number = int(datasets.labels.max(initial=-1)) + 1
        # Labels are numbered dataset by dataset, so sorting by dataset and label sorts by label.
        starts = np.searchsorted(datasets.labels[rows], np.arange(number + 1))
        bounds = np.zeros((number, 2), np.int64)
        sorted_datasets = dataset[rows]
        at = np.minimum(starts[:-1], max(len(rows) - 1, 0))
        if len(rows):
            bounds[:, 0] = np.searchsorted(sorted_datasets, sorted_datasets[at], side="left")
            bounds[:, 1] = np.searchsorted(sorted_datasets, sorted_datasets[at], side="right")
        return cls(rows, datasets.labels, starts, bounds)


def choose_labelled_group(
    seed: int, epoch: int, row: int, *, index: LabelIndex, group_size: int
) -> tuple[int, NDArray[np.int64]]:
    """Which rows are the positive and the negatives of a labelled row in an epoch; no work that grows with the rows.

    Args:
        seed: the experiment's.
        epoch: from 0; another epoch, another choice.
        row: number of a row that `index` holds.
        index: the labelled rows.
        group_size: passages a query, the positive included.

    Returns:
        Number of another row of its dataset and label, and those of group_size - 1 rows of its dataset under other
        labels: without repetition where there are enough, else each as often as any other, give or take one.
    """
    rng = np.random.default_rng([seed, epoch, row, _LABELLED])
    label = int(index.label_of_row[row])
    start, stop = map(int, index.starts[label : label + 2])
    begin, end = map(int, index.dataset_bounds[label])
    own = start + int(np.searchsorted(index.rows[start:stop], row))
    positive = start + int(rng.integers(stop - start - 1))
    positive += positive >= own
    others = (end - begin) - (stop - start)
    whole, rest = divmod(group_size - 1, others)
    places = begin + _distinct(rng, others, rest)
    if whole:  # fewer others than the group has places
        places = np.concatenate([np.tile(np.arange(begin, begin + others), whole), places])
    places[places >= start] += stop - start  # past the rows of its own label
    return int(index.rows[positive]), index.rows[rng.permutation(places)]


def _distinct(rng: np.random.Generator, below: int, number: int) -> NDArray[np.int64]:
    """[number] different whole numbers below a limit, each set of them equally likely.

    Source: R. Floyd's algorithm, in J. Bentley, Programming Pearls: A sample of brilliance, CACM 30(9), 1987.
    """
    chosen: list[int] = []
    for last in range(below - number, below):
        drawn = int(rng.integers(last + 1))
        chosen.append(last if drawn in chosen else drawn)
    return np.array(chosen, np.int64)
