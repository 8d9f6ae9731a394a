"""One pass over the rows of one dataset, cut into batches: at random, by length, without a text twice in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayembed.data.store import Store, hash_texts

Rows = NDArray[np.signedinteger[Any]]
WINDOW = 64  # batches whose rows are sorted by length together: little padding, and still other batches every pass
SCANNED = 64  # batches' worth of waiting rows that are tried again before new rows are


class Pass(NamedTuple):
    """Rows in the order of a pass, and where each batch begins and ends in it."""

    rows: Rows
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


class Bucket(NamedTuple):
    """Rows whose batches have one size."""

    rows: Rows
    batch_size: int


@dataclass(frozen=True)
class TextKeys:
    """What tells the texts of rows apart: equal keys are equal queries, or equal positives."""

    offsets: NDArray[np.int64]
    """[N + 1] where the keys of each row begin in `values`."""

    values: NDArray[np.int64]
    """Hashes of the query and of all positives, whichever of them is drawn."""

    @classmethod
    def of(cls, rows: Store) -> "TextKeys":
        """Reads the texts of the rows once."""
        counts, values = [np.zeros(1, np.int64)], []
        for part in rows.iter_parts(["query", "pos"]):
            for row in part.to_pylist():
                texts = [f"q{row['query']}", *(f"p{text}" for text in dict.fromkeys(row["pos"]))]
                values.append(hash_texts(texts).view(np.int64))
                counts.append(np.array([len(texts)]))
        return cls(np.cumsum(np.concatenate(counts)), np.concatenate(values) if values else np.empty(0, np.int64))

    def of_row(self, row: int) -> list[int]:
        """The keys of one row, each once."""
        found: list[int] = self.values[self.offsets[row] : self.offsets[row + 1]].tolist()
        return found


def buckets_of(
    rows: Rows, batch_sizes: Sequence[tuple[int | None, int]], lengths: NDArray[np.int32] | None
) -> list[Bucket]:
    """The rows by the size of their batches, short ones first.

    Args:
        rows: row numbers of a dataset.
        batch_sizes: (tokens of the longest text at most, queries), ascending, the last without a limit.
        lengths: [N] tokens of the longest text of each row. None: all have the last size.
    """
    if lengths is None:
        return [Bucket(rows, batch_sizes[-1][1])]
    limits = [limit for limit, _ in batch_sizes[:-1]]
    place = np.searchsorted(np.array(limits, np.int64), lengths[rows], side="left")
    return [Bucket(rows[place == i], size) for i, (_, size) in enumerate(batch_sizes)]


def one_pass(
    rng: np.random.Generator,
    buckets: Sequence[Bucket],
    *,
    lengths: NDArray[np.int32] | None = None,
    keys: TextKeys | None = None,
) -> Pass:
    """The batches of a pass. Rows that fill no batch of their bucket go on to that of the next longer texts.

    Args:
        rng: what is drawn from.
        buckets: short texts first.
        lengths: [N] tokens; rows of similar length share a batch. None: no matter.
        keys: no two rows of a batch have a key in common. None: no matter.
    """
    waiting = buckets[0].rows[:0]
    found, starts, stops = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    done = 0
    for members, size in buckets:
        order = np.concatenate([waiting, rng.permutation(members)])
        used = len(order) // size * size
        if lengths is not None:  # what is left over was drawn before: it is no longer than the rest
            window = np.arange(used) // (size * WINDOW)
            order[:used] = order[:used][np.lexsort((lengths[order[:used]], window))]
        batches, waiting = (order[:used], order[used:]) if keys is None else without_duplicates(order, size, keys)
        found.append(batches)
        starts.append(np.arange(0, len(batches), size) + done)
        stops.append(starts[-1] + size)
        done += len(batches)
    first, last = np.concatenate(starts), np.concatenate(stops)
    if lengths is not None or keys is not None:
        order_of_batches = rng.permutation(len(first))
        first, last = first[order_of_batches], last[order_of_batches]
    rows = np.concatenate(found)
    rows.setflags(write=False)  # every batch is a view of it
    return Pass(rows, first, last)


def without_duplicates(order: Rows, size: int, keys: TextKeys) -> tuple[Rows, Rows]:
    """Whole batches one after the other in which no key is twice, and the rows that found no place.

    A row whose key is in the batch waits, and those that wait are tried first for the next one. About 5 s a million
    rows.

    Args:
        order: the rows, by their turn.
        size: rows of a batch.
        keys: of the rows.
    """
    batches: list[int] = []
    waiting: list[int] = []
    position = 0
    while True:
        batch: list[int] = []
        met: set[int] = set()
        still: list[int] = []
        tried = len(waiting) if position == len(order) else min(len(waiting), SCANNED * size)
        for place, row in enumerate(islice(waiting, tried)):
            if len(batch) == size:
                tried = place
                break
            _place(row, keys, batch, met, still)
        still += waiting[tried:]
        while len(batch) < size and position < len(order):
            some = order[position : position + size - len(batch)].tolist()
            position += len(some)
            for row in some:
                _place(row, keys, batch, met, still)
        waiting = still
        if len(batch) < size:
            break
        batches += batch
    return np.array(batches, order.dtype), np.array(batch + waiting, order.dtype)


def _place(row: int, keys: TextKeys, batch: list[int], met: set[int], waiting: list[int]) -> None:
    """Puts a row into the batch, or with those that wait."""
    own = keys.of_row(row)
    if met.isdisjoint(own):
        met.update(own)
        batch.append(row)
    else:
        waiting.append(row)
