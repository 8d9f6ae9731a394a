"""The k best of some passages for every query, by inner product: ties go by passage id.

An index finds the candidates, but its scores differ in the last bit with the number of queries in a call and from
backend to backend, and it does not say which of several equal passages it gives; identical passages (a licence text, a
copied paragraph) are common. So candidates are scored again, by a sum whose result depends on the two vectors alone,
and where an exact index could have left out passages that tie with the k-th, all of them are looked at. The result is
then the same for any exact backend and however the corpus is cut.
"""

import numpy as np
from numpy.typing import NDArray

from rayembed.search.backends import Index, open_index
from rayembed.search.merge import IdsOf, Top, merge_top_k

QUERIES_PER_SEARCH = 1024
RESCORED_BYTES = 4 << 20  # passages that are scored again at once: what a cache holds
LONGEST_SUM = 8192  # numpy cuts longer sums, and where depends on how many there are

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def top_k(
    queries: Floats,
    passages: Floats,
    ids_of: IdsOf,
    k: int,
    *,
    index: Index | None = None,
    queries_per_search: int = QUERIES_PER_SEARCH,
) -> Top:
    """The k best passages for each query.

    Args:
        queries: [Q, D].
        passages: [P, D].
        ids_of: what sorts as the ids of passages do, by row; asked only where scores tie.
        k: at least 1; cut to P.
        index: of the passages. None: flat. An approximate one may miss some of the k best; a query that it finds fewer
            than k passages for is searched exactly.
        queries_per_search: queries given to the index at once; bounds memory.

    Returns:
        Scores [Q, min(k, P)] in descending order, and rows of `passages` [Q, min(k, P)].
    """
    k = min(k, len(passages))
    passages = np.ascontiguousarray(passages, np.float32)
    index = index or open_index("flat", passages)
    longest = float(np.sqrt(np.einsum("pd,pd->p", passages, passages).max()))
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), queries_per_search):
        block = np.ascontiguousarray(queries[start : start + queries_per_search], np.float32)
        error = _rounding(block, longest)
        found, own, unsure = _candidates(block, passages, k, index, error)
        known = np.flatnonzero(~unsure)
        if len(known):
            scores[start + known], rows[start + known] = merge_top_k([own[known]], [found[known]], k, ids_of)
        for i in np.flatnonzero(unsure):
            scores[start + i], rows[start + i] = _of_all(block[i : i + 1], passages, ids_of, k, 2 * error[i])
    return scores, rows


def _candidates(
    queries: Floats, passages: Floats, k: int, index: Index, error: Floats
) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Rows [Q, at least k] and their scores, and [Q] whether the k best may not be among them."""
    fetched = k
    if index.exact:
        fetched += k // 8 + 8  # the surplus shows, for most queries, that none is left out
    fetched = min(fetched, len(passages), max(index.most or fetched, k))
    found_scores, found = index.search(queries, fetched)
    own = products(passages, found, queries)
    unsure: NDArray[np.bool_] = found[:, -1] < 0
    if index.exact and fetched < len(passages):
        least = np.partition(own, -k, axis=1)[:, -k]
        unsure = least <= found_scores[:, -1] + error
    return found, own, unsure


def _of_all(query: Floats, passages: Floats, ids_of: IdsOf, k: int, error: float) -> Top:
    """The k best of all passages for one query [1, D]."""
    rough = passages @ query[0]
    found = np.flatnonzero(rough >= np.partition(rough, -k)[-k] - error)[None]
    scores, rows = merge_top_k([products(passages, found, query)], [found], k, ids_of)
    return scores[0], rows[0]


def products(passages: Floats, rows: Ints, queries: Floats) -> Floats:
    """Inner products [Q, K] of queries [Q, D] and passages by row [Q, K], each a function of the two vectors alone.

    BLAS, unlike einsum, adds up differently for other shapes.
    """
    found = np.empty(rows.shape, np.float32)
    step = max(RESCORED_BYTES // max(4 * rows.shape[1] * passages.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        taken, asked = passages[rows[start : start + step]], queries[start : start + step]
        parts = [
            np.einsum("qkd,qd->qk", taken[..., first : first + LONGEST_SUM], asked[:, first : first + LONGEST_SUM])
            for first in range(0, passages.shape[1], LONGEST_SUM)
        ]
        found[start : start + step] = sum(parts[1:], parts[0])
    return found


def _rounding(queries: Floats, longest: float) -> Floats:
    """[Q] more than two float32 inner products of the same vectors can differ by, however each is added up.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    unit = float(np.finfo(np.float32).eps) / 2
    error: Floats = 2.1 * queries.shape[1] * unit * np.linalg.norm(queries, axis=1) * longest
    return error
