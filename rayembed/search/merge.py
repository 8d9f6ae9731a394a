"""The best of several shards' bests."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def merge_top_k(
    scores: Sequence[NDArray[np.float32]],
    rows: Sequence[NDArray[np.int64]],
    k: int,
    ids_of: Callable[[NDArray[np.int64]], NDArray[np.str_]],
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The k best of all shards for each query, ties by passage id; the result does not depend on the shards' order.

    Args:
        scores: of each shard [Q, k'], descending.
        rows: of each shard [Q, k'], row numbers in the whole corpus.
        k: at least 1.
        ids_of: ids of passages by row number; asked only about passages that may be in the result.

    Returns:
        For each query, scores and rows of at most k passages, best first.
    """
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    width = min(k, all_scores.shape[1])
    least = np.partition(all_scores, -width, axis=1)[:, -width]
    kept = all_scores >= least[:, None]
    ids = ids_of(all_rows[kept])
    merged, start = [], 0
    for query in range(len(all_scores)):
        own_scores, own_rows = all_scores[query, kept[query]], all_rows[query, kept[query]]
        own_ids = ids[start : start + len(own_rows)]
        start += len(own_rows)
        order = np.lexsort((own_ids, -own_scores))[:width]
        merged.append((own_scores[order], own_rows[order]))
    return merged
