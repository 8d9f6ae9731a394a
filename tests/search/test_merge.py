"""Any shards in any order merge to the top-k of the whole, ties by id."""

import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.search.exact import top_k
from rayembed.search.merge import fold_top_k, merge_top_k

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Ids = NDArray[np.str_]


def whole(queries: Floats, passages: Floats, ids: Ids, k: int) -> list[tuple[list[float], list[int]]]:
    """The definition: each query's passages sorted by score and then id."""
    found = []
    for query in queries:
        products = np.einsum("pd,d->p", passages, query)
        best = sorted(range(len(passages)), key=lambda row: (-products[row], ids[row]))[:k]
        found.append(([float(products[row]) for row in best], best))
    return found


def sharded(
    queries: Floats, passages: Floats, ids: Ids, k: int, shards: list[tuple[int, int]]
) -> list[tuple[list[float], list[int]]]:
    """What the jobs do: a search a shard, rows counted in the whole corpus."""
    tops = []
    for start, stop in shards:
        ranks = np.empty(stop - start, np.int64)
        ranks[np.argsort(ids[start:stop])] = np.arange(stop - start)
        scores, rows = top_k(queries, passages[start:stop], partial(np.take, ranks), k)
        tops.append((scores, rows + start))
    merged = merge_top_k([t[0] for t in tops], [t[1] for t in tops], k, lambda rows: ids[rows])
    for at_once in (1, 2, 3):
        folded = fold_top_k(iter(tops), k, lambda rows: ids[rows], shards_at_once=at_once)
        assert [part.tolist() for part in folded] == [part.tolist() for part in merged], "whatever is held at once"
    assert (merged[0].dtype, merged[1].dtype) == (np.float32, np.int64)
    return list(zip(merged[0].tolist(), merged[1].tolist(), strict=True))


def integers(rng: np.random.Generator, rows: int) -> Floats:
    return rng.integers(-2, 3, (rows, 6)).astype(np.float32)


def real(rng: np.random.Generator, rows: int) -> Floats:
    """A few different vectors many times over, as copied passages are."""
    different = rng.standard_normal((max(rows // 3, 1), 48)).astype(np.float32)
    return different[rng.integers(len(different), size=rows)]


@pytest.mark.parametrize("vectors", [integers, real])
@pytest.mark.parametrize("seed", range(40))
def test_merged_shards_equal_the_whole(seed: int, vectors: Callable[[np.random.Generator, int], Floats]) -> None:
    rng = np.random.default_rng(seed)
    number, k = int(rng.integers(1, 200)), int(rng.integers(1, 40))
    passages, queries = vectors(rng, number), vectors(rng, int(rng.integers(1, 25)))
    ids = np.array([f"d{i}" for i in rng.permutation(number)])
    cuts = np.unique(np.concatenate([[0, number], rng.integers(0, number + 1, int(rng.integers(0, 6)))])).tolist()
    shards = list(pairwise(cuts))
    rng.shuffle(shards)
    shards = [(int(start), int(stop)) for start, stop in shards]
    assert sharded(queries, passages, ids, k, shards) == whole(queries, passages, ids, k)


def test_ids_are_asked_only_for_ties_that_may_be_in_the_result() -> None:
    asked: list[int] = []

    def ids_of(rows: Ints) -> Ids:
        asked.extend(rows.tolist())
        return np.array([f"{row:03d}" for row in rows])

    scores = [np.array([[9, 5, 1]], np.float32), np.array([[7, 5, 1]], np.float32)]
    rows = [np.array([[30, 20, 10]]), np.array([[3, 2, 1]])]
    found_scores, found_rows = merge_top_k(scores, rows, 3, ids_of)
    assert found_scores.tolist() == [[9, 7, 5]]
    assert found_rows.tolist() == [[30, 3, 2]]  # 002 comes before 020
    assert sorted(asked) == [2, 20]


def test_shards_of_fewer_passages_than_k() -> None:
    scores = [np.array([[2.0]], np.float32), np.array([[3.0, 1.0]], np.float32)]
    found_scores, found_rows = merge_top_k(
        scores, [np.array([[0]]), np.array([[1, 2]])], 10, lambda rows: rows.astype(np.str_)
    )
    assert (found_scores.tolist(), found_rows.tolist()) == ([[3, 2, 1]], [[1, 0, 2]])


def test_folding_holds_no_more_shards_than_it_says() -> None:
    """A shard is asked for only when those of the groups before are merged."""
    alive: set[int] = set()
    most = 0

    def shard(number: int) -> tuple[Floats, Ints]:
        nonlocal most
        scores, rows = np.full((2, 3), number, np.float32), np.arange(3) + 3 * np.full((2, 1), number)
        alive.add(number)
        weakref.finalize(scores, alive.discard, number)
        most = max(most, len(alive))
        return scores, rows

    fold_top_k((shard(i) for i in range(40)), 5, lambda rows: rows.astype(np.str_), shards_at_once=4)
    assert 4 <= most <= 8
