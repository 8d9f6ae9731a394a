"""Negatives are drawn evenly from the window, by the query's id alone, and never what they must not be."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rayembed.mining.filters import Candidate, Query
from rayembed.mining.selection import Selection, query_seed, select

QUERY = Query("q", frozenset({"d3"}), frozenset({"text 7"}))


def passage(number: int, rank: int = -1) -> Candidate:
    return Candidate(f"d{number}", f"text {number}", rank, 1 - rank / 1000)


def window(first: int, last: int) -> list[Candidate]:
    return [passage(rank, rank) for rank in range(first, last)]


def corpus_draw(numbers: Sequence[int]) -> Callable[[np.random.Generator, int], list[Candidate]]:
    return lambda rng, count: [passage(numbers[int(i)]) for i in rng.integers(len(numbers), size=count)]


def pick(
    candidates: Sequence[Candidate],
    number: int,
    *,
    query_id: str = "q1",
    draw: Callable[[np.random.Generator, int], list[Candidate]] | None = None,
) -> Selection:
    return select(QUERY, candidates, number=number, seed=query_seed(42, query_id), draw=draw)


def ids(selection: Selection) -> list[str]:
    return [negative.id for negative in selection.negatives]


def test_the_draw_is_a_function_of_seed_and_query_id() -> None:
    queries = [f"q{i}" for i in range(30)]
    forward = {query: ids(pick(window(10, 210), 15, query_id=query)) for query in queries}
    backward = {query: ids(pick(window(10, 210), 15, query_id=query)) for query in reversed(queries)}
    assert forward == backward
    assert len({tuple(found) for found in forward.values()}) == len(queries)
    assert query_seed(42, "q1") != query_seed(43, "q1")
    assert ids(select(QUERY, window(10, 210), number=15, seed=query_seed(43, "q1"), draw=None)) != forward["q1"]


def test_the_seed_is_the_same_on_every_machine() -> None:
    """The words of the id's SHA-256; Python's own hash() differs from process to process."""
    assert query_seed(42, "q1") == [42, 3253231047, 1387185079, 1729235282, 3215537831]


def test_negatives_are_different_and_in_the_order_of_rank() -> None:
    for query in range(50):
        ranks = [negative.rank for negative in pick(window(10, 60), 15, query_id=str(query)).negatives]
        assert len(ranks) == 15
        assert ranks == sorted(set(ranks))
        assert set(ranks) <= set(range(10, 60))


def test_all_ranks_are_drawn_alike() -> None:
    """Each rank is drawn 600 times of 4000 on average; 6 standard deviations are 135."""
    drawn = Counter(
        negative.rank for query in range(4000) for negative in pick(window(10, 110), 15, query_id=str(query)).negatives
    )
    assert sum(drawn.values()) == 60_000
    assert set(drawn) == set(range(10, 110))
    assert max(abs(count - 600) for count in drawn.values()) < 135


def test_never_a_positive_the_query_or_a_text_twice() -> None:
    candidates = [
        *window(0, 12),
        Candidate("copy", "text  5", 12, 0),
        Candidate("self", " q", 13, 0),
        Candidate("positive again", "text 7 ", 14, 0),
    ]
    selection = pick(candidates, 15, draw=corpus_draw([3, 5, 7, 20, 21]))
    assert sorted(ids(selection)) == sorted([f"d{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 20, 21)])
    assert selection.dropped == {"positive_id": 1, "positive_text": 2, "repeated_text": 1, "query_text": 1}
    assert (selection.filled_up, selection.short_by) == (2, 3)


def test_what_is_missing_is_filled_up_from_the_corpus_and_counted() -> None:
    selection = pick(window(0, 5), 8, draw=corpus_draw(range(1000)))
    found = ids(selection)
    assert found[:4] == ["d0", "d1", "d2", "d4"]  # d3 is a positive
    assert len(set(found)) == 8
    assert (selection.filled_up, selection.short_by) == (4, 0)
    assert found == ids(pick(window(0, 5), 8, draw=corpus_draw(range(1000))))
    assert found != ids(pick(window(0, 5), 8, query_id="q2", draw=corpus_draw(range(1000))))


def test_a_full_window_is_not_filled_up() -> None:
    def draw(rng: np.random.Generator, count: int) -> list[Candidate]:
        raise AssertionError("nothing is missing")

    assert pick(window(10, 20), 10, draw=draw).filled_up == 0


def test_without_fill_up_what_is_missing_is_counted() -> None:
    selection = pick(window(0, 5), 8)
    assert (len(selection.negatives), selection.filled_up, selection.short_by) == (4, 0, 4)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_small_corpus_gives_all_it_has(size: int) -> None:
    selection = pick([], 15, draw=corpus_draw(range(size)))
    expected = {f"d{i}" for i in range(size)} - {"d3", "d7"}
    assert set(ids(selection)) == expected
    assert len(selection.negatives) == selection.filled_up == len(expected)
    assert selection.short_by == 15 - len(expected)
