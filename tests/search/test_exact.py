"""top_k against a full sort, where ties are exact, where scores differ in the last bits, and at the edges."""

from collections.abc import Iterator

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.search.exact import top_k

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def integers(rng: np.random.Generator, rows: int, dimension: int = 8) -> Floats:
    """Vectors whose products are exact in float32 and tie often."""
    return rng.integers(-2, 3, (rows, dimension)).astype(np.float32)


def unit(rng: np.random.Generator, rows: int, dimension: int) -> Floats:
    vectors = rng.standard_normal((rows, dimension)).astype(np.float32)
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def brute_force(queries: Floats, passages: Floats, id_ranks: Ints, k: int) -> tuple[Floats, Ints]:
    """All products in float64, sorted by score and then id."""
    products = queries.astype(np.float64) @ passages.astype(np.float64).T
    rows = np.stack([np.lexsort((id_ranks, -own))[:k] for own in products])
    return np.take_along_axis(products, rows, axis=1).astype(np.float32), rows


def cases() -> Iterator[tuple[int, int, int, int]]:
    rng = np.random.default_rng(11)
    for seed in range(40):
        yield seed, int(rng.integers(1, 120)), int(rng.integers(1, 30)), int(rng.integers(1, 60))


@pytest.mark.parametrize(("seed", "passages", "queries", "k"), list(cases()))
def test_many_ties_match_a_full_sort(seed: int, passages: int, queries: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    corpus, asked, ranks = integers(rng, passages), integers(rng, queries), rng.permutation(passages)
    scores, rows = top_k(asked, corpus, ranks, k, queries_per_search=7)
    expected_scores, expected_rows = brute_force(asked, corpus, ranks, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


def test_of_many_copies_at_the_kth_place_the_smallest_ids_are_taken() -> None:
    rng = np.random.default_rng(1)
    passages = np.concatenate([unit(rng, 5, 64), np.repeat(unit(rng, 1, 64), 300, axis=0), unit(rng, 200, 64)])
    queries = np.repeat(passages[5:6], 25, axis=0)
    ranks = rng.permutation(len(passages))
    scores, rows = top_k(queries, passages, ranks, 10)
    copies = np.arange(5, 305)
    expected = copies[np.argsort(ranks[copies])][:10]
    np.testing.assert_array_equal(rows, np.tile(expected, (25, 1)))
    np.testing.assert_array_equal(scores, np.full((25, 10), scores[0, 0]))


def test_scores_that_differ_in_the_last_bits_are_no_ties() -> None:
    """At the k-th place, with the ids against the order of the scores."""
    steps = np.arange(40, dtype=np.float32) * np.float32(2**-24)
    passages = np.stack([np.float32(0.5) + steps, np.zeros(40, np.float32)], axis=1)
    assert len(np.unique(passages[:, 0])) == 40
    scores, rows = top_k(np.array([[1, 0]], np.float32), passages, np.arange(40), 5)
    assert rows.tolist() == [[39, 38, 37, 36, 35]]
    np.testing.assert_array_equal(scores[0], passages[rows[0], 0])


def test_real_vectors_equal_one_faiss_index() -> None:
    rng = np.random.default_rng(2)
    passages, queries = unit(rng, 3000, 96), unit(rng, 50, 96)
    index = faiss.IndexFlatIP(96)
    index.add(passages)
    expected_scores, expected_rows = index.search(queries, 20)
    scores, rows = top_k(queries, passages, np.arange(3000), 20)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    np.testing.assert_array_equal(rows, expected_rows)
    assert bool((np.diff(scores) <= 0).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_result_does_not_depend_on_how_many_queries_are_searched_at_once(scale: float) -> None:
    """To the last bit: FAISS itself adds up differently for one query than for many."""
    rng = np.random.default_rng(3)
    passages, queries = scale * unit(rng, 700, 96), unit(rng, 45, 96)
    passages[300:600] = passages[:300]
    scores, rows = top_k(queries, passages, np.arange(700), 30, queries_per_search=1024)
    for block in (1, 7, 44):
        other_scores, other_rows = top_k(queries, passages, np.arange(700), 30, queries_per_search=block)
        np.testing.assert_array_equal(other_scores, scores)
        np.testing.assert_array_equal(other_rows, rows)


def test_near_copies_beyond_what_is_fetched_are_not_lost() -> None:
    """200 passages within rounding of each other: FAISS alone may leave out one of the best."""
    rng = np.random.default_rng(4)
    query = unit(rng, 1, 256)
    passages = np.repeat(query, 200, axis=0) + rng.uniform(-2e-7, 2e-7, (200, 256)).astype(np.float32)
    scores, rows = top_k(query, passages, np.arange(200), 3)
    own = np.einsum("pd,d->p", passages, query[0])
    assert rows[0].tolist() == np.lexsort((np.arange(200), -own))[:3].tolist()
    np.testing.assert_array_equal(scores[0], own[rows[0]])


def test_k_is_cut_to_the_shard() -> None:
    rng = np.random.default_rng(5)
    passages, queries = integers(rng, 4), integers(rng, 3)
    scores, rows = top_k(queries, passages, np.arange(4), 100)
    assert scores.shape == rows.shape == (3, 4)
    assert [sorted(own) for own in rows.tolist()] == [[0, 1, 2, 3]] * 3


def test_one_passage() -> None:
    scores, rows = top_k(np.array([[2, 0]], np.float32), np.array([[3, 1]], np.float32), np.array([0]), 5)
    assert (scores.tolist(), rows.tolist()) == ([[6.0]], [[0]])


def test_no_queries() -> None:
    scores, rows = top_k(np.empty((0, 2), np.float32), np.ones((3, 2), np.float32), np.arange(3), 2)
    assert scores.shape == rows.shape == (0, 2)
