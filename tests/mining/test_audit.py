"""What the audit counts, shows, and does not depend on."""

import math
import random

import pytest

from rayembed.mining.audit import EXAMPLES, SCORE_BINS, TEXT_LIMIT, example, example_rows, histograms, rank_bins, summed
from rayembed.mining.filters import Candidate


def candidate(rank: int, score: float) -> Candidate:
    return Candidate(f"c{rank}", "a text", rank, score)


FILLED_UP = candidate(-1, math.nan)


@pytest.mark.parametrize(("first", "last"), [(10, 210), (0, 7), (5, 1000), (3, 4)])
def test_ranks_are_counted_by_their_part_of_the_window(first: int, last: int) -> None:
    found = histograms(
        [FILLED_UP, *(candidate(r, 0) for r in range(first, last))], [], first_rank=first, last_rank=last
    )
    bins = rank_bins(first, last)
    expected = [0] * bins
    for rank in range(first, last):
        expected[(rank - first) * bins // (last - first)] += 1
    assert found["ranks"] == expected
    assert sum(found["ranks"]) == last - first


def test_scores_are_counted_in_steps_of_a_twentieth_and_beyond_one_at_the_ends() -> None:
    scores = [-3.0, -1.0, -0.01, 0.01, 0.51, 0.54, 1.0, 1.7]
    expected = [0] * SCORE_BINS
    for place in (0, 0, 19, 20, 30, 30, 39, 39):
        expected[place] += 1
    found = histograms([FILLED_UP, *(candidate(0, score) for score in scores)], [0.96], first_rank=0, last_rank=9)
    assert found["negative_scores"] == expected
    assert found["positive_scores"] == [0] * 39 + [1]


def test_units_add_up_to_the_whole() -> None:
    rng = random.Random(0)
    negatives = [candidate(rng.randrange(10, 60), rng.uniform(-1, 1)) for _ in range(200)]
    whole = histograms(negatives, [0.1, 0.9, 0.9], first_rank=10, last_rank=60)
    cut = [
        histograms(negatives[:70], [0.9], first_rank=10, last_rank=60),
        histograms(negatives[70:], [0.1, 0.9], first_rank=10, last_rank=60),
    ]
    assert summed(cut) == whole
    assert sum(whole["negative_scores"]) == 200


def test_rows_shown_are_drawn_by_the_seed() -> None:
    shown = example_rows(100_000, 42)
    assert len(shown) == EXAMPLES
    assert shown == example_rows(100_000, 42) != example_rows(100_000, 43)
    assert max(shown) < 100_000
    assert max(shown) - min(shown) > 50_000
    assert example_rows(3, 42) == {0, 1, 2}


def test_examples_have_cut_texts_and_no_rank_where_filled_up() -> None:
    long = "x" * 1000
    found = example(long, [long], [Candidate("a", long, 12, 0.5), FILLED_UP])
    cut = "x" * (TEXT_LIMIT - 1) + "…"
    assert found == {
        "query": cut,
        "positives": [cut],
        "negatives": [
            {"id": "a", "text": cut, "rank": 12, "score": 0.5},
            {"id": "c-1", "text": "a text", "rank": None, "score": None},
        ],
    }
    assert example("x" * TEXT_LIMIT, [], [])["query"] == "x" * TEXT_LIMIT
