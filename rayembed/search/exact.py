"""The k best passages of one shard for every query, by inner product, exactly: ties go by passage id.

FAISS finds the k best but not which of several equal ones; identical passages (a licence text, a copied paragraph) have
identical vectors, so ties at the k-th place are common. Queries with one are looked at again.
"""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray


def top_k(
    queries: NDArray[np.float32],
    passages: NDArray[np.float32],
    id_ranks: NDArray[np.int64],
    k: int,
    *,
    use_gpu: bool = False,
    queries_per_search: int = 1024,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best passages of a shard for each query.

    Args:
        queries: [Q, D].
        passages: [P, D], the shard.
        id_ranks: [P] place of each passage's id among the shard's sorted ids; decides ties.
        k: at least 1; cut to P.
        use_gpu: search on this process's GPU.
        queries_per_search: queries given to FAISS at once; bounds memory.

    Returns:
        Scores [Q, min(k, P)] in descending order, and rows in the shard [Q, min(k, P)].
    """
    k = min(k, len(passages))
    index: Any = faiss.IndexFlatIP(passages.shape[1])
    if use_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(np.ascontiguousarray(passages, np.float32))
    fetched = min(k + 1, len(passages))  # one more shows whether the k-th place is tied
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), queries_per_search):
        block = np.ascontiguousarray(queries[start : start + queries_per_search], np.float32)
        found_scores, found_rows = index.search(block, fetched)
        order = np.lexsort((id_ranks[found_rows], -found_scores))[:, :k]
        stop = start + len(block)
        scores[start:stop] = np.take_along_axis(found_scores, order, axis=1)
        rows[start:stop] = np.take_along_axis(found_rows, order, axis=1)
        if fetched > k:
            for query in np.flatnonzero(found_scores[:, k] >= found_scores[:, k - 1]):
                scores[start + query], rows[start + query] = _resolve(
                    block[query], passages, id_ranks, k, found_scores[query], found_rows[query]
                )
    return scores, rows


def _resolve(
    query: NDArray[np.float32],
    passages: NDArray[np.float32],
    id_ranks: NDArray[np.int64],
    k: int,
    found_scores: NDArray[np.float32],
    found_rows: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One query whose k-th place is tied: all passages with that score compete by id.

    Equal means an identical vector or, for different vectors, an equal product in float32 as numpy computes it here.
    """
    least = found_scores[k - 1]
    above = found_scores > least
    products = passages @ query
    margin = np.float32(1e-6) * max(np.float32(1.0), abs(least))  # numpy and FAISS may differ in the last bits
    tied = np.flatnonzero(np.abs(products - least) <= margin)
    tied = tied[~np.isin(tied, found_rows[above])]
    rows = np.concatenate([found_rows[above], tied])
    scores = np.concatenate([found_scores[above], np.full(len(tied), least, np.float32)])
    order = np.lexsort((id_ranks[rows], -scores))[:k]
    return scores[order], rows[order]
