"""top_k against a full sort by every exact backend, where scores tie or differ in the last bits, and at the edges."""

from collections.abc import Callable, Iterator
from functools import partial

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.search.backends import Index, _torch, open_index
from rayembed.search.exact import products, top_k

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Open = Callable[[Floats], Index]


def careless(passages: Floats) -> Index:
    """As far off as an exact index may be: a query's scores are off by rounding, and of what ties any is given."""

    def search(queries: Floats, k: int) -> tuple[Floats, Ints]:
        rng = np.random.default_rng(k)
        exact = queries.astype(np.float64) @ passages.astype(np.float64).T
        lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(passages, axis=1)
        scores = exact + rng.uniform(-1, 1, exact.shape) * lengths * len(passages[0]) * 2.0**-24
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1).astype(np.float32), order

    return Index(search, exact=True)


BACKENDS: dict[str, Open] = {
    "flat": partial(open_index, "flat"),
    "torch": partial(open_index, "torch"),
    "torch in blocks": partial(_torch, "cpu", block_bytes=500),
    "careless": careless,
}


@pytest.fixture(params=BACKENDS)
def opened(request: pytest.FixtureRequest) -> Open:
    return BACKENDS[request.param]


def by(ranks: Ints) -> Callable[[Ints], Ints]:
    return lambda rows: ranks[rows]


def integers(rng: np.random.Generator, rows: int, dimension: int = 8) -> Floats:
    """Vectors whose products are exact in float32 and tie often."""
    return rng.integers(-2, 3, (rows, dimension)).astype(np.float32)


def unit(rng: np.random.Generator, rows: int, dimension: int) -> Floats:
    vectors = rng.standard_normal((rows, dimension)).astype(np.float32)
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def brute_force(queries: Floats, passages: Floats, id_ranks: Ints, k: int) -> tuple[Floats, Ints]:
    """All products in float64, sorted by score and then id."""
    found = queries.astype(np.float64) @ passages.astype(np.float64).T
    rows = np.stack([np.lexsort((id_ranks, -own))[:k] for own in found])
    return np.take_along_axis(found, rows, axis=1).astype(np.float32), rows


def cases() -> Iterator[tuple[int, int, int, int]]:
    rng = np.random.default_rng(11)
    for seed in range(40):
        yield seed, int(rng.integers(1, 120)), int(rng.integers(1, 30)), int(rng.integers(1, 60))


@pytest.mark.parametrize(("seed", "passages", "queries", "k"), list(cases()))
def test_many_ties_match_a_full_sort(seed: int, passages: int, queries: int, k: int, opened: Open) -> None:
    rng = np.random.default_rng(seed)
    corpus, asked, ranks = integers(rng, passages), integers(rng, queries), rng.permutation(passages)
    scores, rows = top_k(asked, corpus, by(ranks), k, index=opened(corpus), queries_per_search=7)
    expected_scores, expected_rows = brute_force(asked, corpus, ranks, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


def test_of_many_copies_at_the_kth_place_the_smallest_ids_are_taken(opened: Open) -> None:
    rng = np.random.default_rng(1)
    passages = np.concatenate([unit(rng, 5, 64), np.repeat(unit(rng, 1, 64), 300, axis=0), unit(rng, 200, 64)])
    queries = np.repeat(passages[5:6], 25, axis=0)
    ranks = rng.permutation(len(passages))
    scores, rows = top_k(queries, passages, by(ranks), 10, index=opened(passages))
    copies = np.arange(5, 305)
    expected = copies[np.argsort(ranks[copies])][:10]
    np.testing.assert_array_equal(rows, np.tile(expected, (25, 1)))
    np.testing.assert_array_equal(scores, np.full((25, 10), scores[0, 0]))


def test_scores_that_differ_in_the_last_bits_are_no_ties(opened: Open) -> None:
    """At the k-th place, with the ids against the order of the scores."""
    steps = np.arange(40, dtype=np.float32) * np.float32(2**-24)
    passages = np.stack([np.float32(0.5) + steps, np.zeros(40, np.float32)], axis=1)
    assert len(np.unique(passages[:, 0])) == 40
    query = np.array([[1, 0]], np.float32)
    scores, rows = top_k(query, passages, by(np.arange(40)), 5, index=opened(passages))
    assert rows.tolist() == [[39, 38, 37, 36, 35]]
    np.testing.assert_array_equal(scores[0], passages[rows[0], 0])


@pytest.mark.parametrize("shift", [0.0, -0.3])
def test_real_vectors_equal_one_faiss_index(opened: Open, shift: float) -> None:
    """Also where all scores are below 0."""
    rng = np.random.default_rng(2)
    passages, queries = unit(rng, 3000, 96), unit(rng, 50, 96)
    passages, queries = passages + np.float32(shift), queries - np.float32(shift)
    index = faiss.IndexFlatIP(96)
    index.add(passages)
    expected_scores, expected_rows = index.search(queries, 20)
    assert bool((expected_scores < 0).all()) == (shift < 0)
    scores, rows = top_k(queries, passages, by(np.arange(3000)), 20, index=opened(passages))
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    np.testing.assert_array_equal(rows, expected_rows)
    assert bool((np.diff(scores) <= 0).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_result_does_not_depend_on_the_index_or_on_how_many_queries_are_searched_at_once(scale: float) -> None:
    """To the last bit: indexes add up differently from one another, and for one query than for many."""
    rng = np.random.default_rng(3)
    passages, queries = np.float32(scale) * unit(rng, 700, 96), unit(rng, 45, 96)
    passages[300:600] = passages[:300]
    ids = by(np.arange(700))
    scores, rows = top_k(queries, passages, ids, 30, queries_per_search=1024)
    for open_other in BACKENDS.values():
        for block in (1, 7, 44):
            other = top_k(queries, passages, ids, 30, index=open_other(passages), queries_per_search=block)
            np.testing.assert_array_equal(other[0], scores)
            np.testing.assert_array_equal(other[1], rows)


def test_near_copies_beyond_what_is_fetched_are_not_lost(opened: Open) -> None:
    """200 passages within rounding of each other: an index alone may leave out one of the best."""
    rng = np.random.default_rng(4)
    query = unit(rng, 1, 256)
    passages = np.repeat(query, 200, axis=0) + rng.uniform(-2e-7, 2e-7, (200, 256)).astype(np.float32)
    scores, rows = top_k(query, passages, by(np.arange(200)), 3, index=opened(passages))
    own = np.einsum("pd,d->p", passages, query[0])
    assert rows[0].tolist() == np.lexsort((np.arange(200), -own))[:3].tolist()
    np.testing.assert_array_equal(scores[0], own[rows[0]])


@pytest.mark.parametrize("dimension", [1, 2, 3, 7, 8, 17, 64, 100, 384, 1000, 9000, 20000])
def test_a_product_is_the_same_whatever_it_is_computed_with(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    passages, queries = (rng.standard_normal((rows, dimension), np.float32) for rows in (30, 9))
    rows = rng.integers(0, 30, (9, 20))
    together = products(passages, rows, queries)
    alone = [
        [products(passages, rows[q : q + 1, i : i + 1], queries[q : q + 1])[0, 0] for i in range(20)] for q in range(9)
    ]
    np.testing.assert_array_equal(together, np.array(alone, np.float32))
    monkeypatch.setattr("rayembed.search.exact.RESCORED_BYTES", 3 * 4 * 20 * dimension)
    np.testing.assert_array_equal(products(passages, rows, queries), together)
    exact = np.einsum("qkd,qd->qk", passages[rows].astype(np.float64), queries.astype(np.float64))
    np.testing.assert_allclose(together, exact, atol=1e-5 * dimension**0.5)


def test_ids_are_asked_only_where_scores_tie() -> None:
    rng = np.random.default_rng(6)
    passages, queries = unit(rng, 50, 64), unit(rng, 3, 64)
    passages[7] = passages[20]
    asked: list[int] = []

    def ids(rows: Ints) -> Ints:
        asked.extend(rows.tolist())
        return rows

    top_k(queries, passages, ids, 50)
    assert set(asked) == {7, 20}


def test_an_approximate_index_is_believed_and_asked_for_no_more_than_k() -> None:
    """What it gives is scored again, what it misses is missed; where it gives too few, all passages are searched."""
    passages, queries = np.arange(1, 21, dtype=np.float32)[:, None], np.ones((2, 1), np.float32)

    def search(queries: Floats, k: int) -> tuple[Floats, Ints]:
        assert k == 3
        return np.zeros((2, 3), np.float32), np.array([[4, 18, 2], [19, 3, -1]])

    scores, rows = top_k(queries, passages, by(np.arange(20)), 3, index=Index(search, exact=False))
    assert rows.tolist() == [[18, 4, 2], [19, 18, 17]]
    assert scores.tolist() == [[19, 5, 3], [20, 19, 18]]


def test_an_index_with_a_largest_k_is_asked_for_no_more() -> None:
    rng = np.random.default_rng(7)
    passages, queries = integers(rng, 90), integers(rng, 6)
    flat, asked = open_index("flat", passages), list[int]()

    def search(queries: Floats, k: int) -> tuple[Floats, Ints]:
        asked.append(k)
        return flat.search(queries, k)

    scores, rows = top_k(queries, passages, by(np.arange(90)), 20, index=Index(search, exact=True, most=21))
    assert asked == [21]
    np.testing.assert_array_equal(rows, brute_force(queries, passages, np.arange(90), 20)[1])
    assert scores.shape == (6, 20)


def test_k_is_cut_to_the_passages(opened: Open) -> None:
    rng = np.random.default_rng(5)
    passages, queries = integers(rng, 4), integers(rng, 3)
    scores, rows = top_k(queries, passages, by(np.arange(4)), 100, index=opened(passages))
    assert scores.shape == rows.shape == (3, 4)
    assert [sorted(own) for own in rows.tolist()] == [[0, 1, 2, 3]] * 3


def test_one_passage() -> None:
    scores, rows = top_k(np.array([[2, 0]], np.float32), np.array([[3, 1]], np.float32), by(np.array([0])), 5)
    assert (scores.tolist(), rows.tolist()) == ([[6.0]], [[0]])


def test_no_queries() -> None:
    scores, rows = top_k(np.empty((0, 2), np.float32), np.ones((3, 2), np.float32), by(np.arange(3)), 2)
    assert scores.shape == rows.shape == (0, 2)
