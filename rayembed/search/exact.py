"""The k best passages of one shard for every query, by inner product, exactly: ties go by passage id.

FAISS finds the candidates, but its scores differ in the last bit with the number of queries in a call, and it does not
say which of several equal passages it gives; identical passages (a licence text, a copied paragraph) are common. So
candidates are scored again one by one, by a sum whose result depends on the two vectors alone, and where passages that
FAISS left out could tie with the k-th, all of the shard's are looked at. The result is then the same for any shards.
"""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

GPU_MOST = 2048  # FAISS on a GPU finds no more than this many a query


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
    passages = np.ascontiguousarray(passages, np.float32)
    index: Any = faiss.IndexFlatIP(passages.shape[1])
    if use_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(passages)
    fetched = min(k + k // 8 + 8, len(passages))  # the surplus shows, for most queries, that none is left out
    if use_gpu:
        fetched = min(fetched, max(k, GPU_MOST))
    longest = float(np.sqrt(np.einsum("pd,pd->p", passages, passages).max()))
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), queries_per_search):
        block = np.ascontiguousarray(queries[start : start + queries_per_search], np.float32)
        found_scores, found_rows = index.search(block, fetched)
        for i, query in enumerate(block):
            found = found_rows[i]
            own = _products(passages, found, query)
            if fetched < len(passages):
                error = _rounding(query, longest)
                least = np.partition(own, -k)[-k]
                if least <= found_scores[i, -1] + error:
                    found = np.flatnonzero(passages @ query >= least - error)
                    own = _products(passages, found, query)
            order = np.lexsort((id_ranks[found], -own))[:k]
            scores[start + i], rows[start + i] = own[order], found[order]
    return scores, rows


def _products(
    passages: NDArray[np.float32], rows: NDArray[np.int64], query: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Inner products of a query and some passages; BLAS, unlike einsum, adds up differently for other shapes."""
    products: NDArray[np.float32] = np.einsum("pd,d->p", passages[rows], query)
    return products


def _rounding(query: NDArray[np.float32], longest: float) -> float:
    """More than two float32 inner products of the same vectors can differ by, however each is added up.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    unit = float(np.finfo(np.float32).eps) / 2
    return 2.1 * len(query) * unit * float(np.linalg.norm(query)) * longest
