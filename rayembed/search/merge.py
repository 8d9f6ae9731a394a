"""The best of several shards' bests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Top = tuple[NDArray[np.float32], NDArray[np.int64]]
IdsOf = Callable[[NDArray[np.int64]], NDArray[np.object_] | NDArray[np.str_] | NDArray[np.int64]]
SHARDS_AT_ONCE = 8  # more hold more in memory, fewer sort the best so far more often


def merge_top_k(scores: Sequence[NDArray[np.float32]], rows: Sequence[NDArray[np.int64]], k: int, ids_of: IdsOf) -> Top:
    """The k best of all shards for each query, ties by passage id; the result does not depend on the shards' order.

    Args:
        scores: of each shard [Q, k'].
        rows: of each shard [Q, k'], row numbers in the whole corpus.
        k: at least 1.
        ids_of: ids of passages by row number, or numbers that sort as they do; asked only about passages that may be in
            the result and tie.

    Returns:
        Scores and rows [Q, at most k], best first.
    """
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    width = min(k, all_scores.shape[1])
    order = np.argsort(-all_scores, axis=1, kind="stable")
    descending = np.take_along_axis(all_scores, order, axis=1)
    alike = np.zeros((len(descending), descending.shape[1] + 1), np.bool_)  # whether it scores as the one before
    alike[:, 1:-1] = descending[:, 1:] == descending[:, :-1]
    alike[:, :-1] |= alike[:, 1:]
    tied = alike[:, :-1] & (descending >= descending[:, width - 1 : width])
    unsettled = np.flatnonzero(tied.any(axis=1))
    if len(unsettled):
        order[unsettled] = _by_id(all_scores[unsettled], all_rows[unsettled], order[unsettled], tied[unsettled], ids_of)
    order = order[:, :width]
    return np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_rows, order, axis=1)


def _by_id(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    order: NDArray[np.int64],
    tied: NDArray[np.bool_],
    ids_of: IdsOf,
) -> NDArray[np.int64]:
    """Order of each query's scores with those that tie by id; `tied` is by place in the order that they have now."""
    here = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(here, order, tied, axis=1)
    places = np.zeros(scores.shape, np.int64)
    places[here] = np.unique(ids_of(rows[here]), return_inverse=True)[1]
    ordered: NDArray[np.int64] = np.lexsort((places, -scores), axis=1)
    return ordered


def fold_top_k(shards: Iterable[Top], k: int, ids_of: IdsOf, *, shards_at_once: int = SHARDS_AT_ONCE) -> Top:
    """What `merge_top_k` gives, with `shards_at_once` shards in memory beside the best so far.

    Args:
        shards: scores and rows of each shard, made when they are asked for; at least one.
        k: at least 1.
        ids_of: ids of passages by row number.
        shards_at_once: at least 1.

    Returns:
        Scores and rows [Q, at most k], best first.
    """
    best: Top | None = None
    rest: Iterator[Top] = iter(shards)
    while group := list(islice(rest, shards_at_once)):
        if best is not None:
            group.append(best)
        best = merge_top_k([scores for scores, _ in group], [rows for _, rows in group], k, ids_of)
    assert best is not None, "no shard to merge"
    return best
