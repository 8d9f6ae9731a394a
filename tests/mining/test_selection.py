"""The draw is a function of seed and query id alone, each strategy has its distribution, and limits hold."""

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest

from rayembed.mining.selection import Uses, choose, draw_order, query_seed

STRATEGIES = ["random", "top", "weighted"]


def order(strategy: str, number: int, *, query_id: str = "q1", seed: int = 42) -> list[int]:
    rng = np.random.default_rng(query_seed(seed, query_id))
    return draw_order(np.arange(10, 10 + number), strategy=strategy, rng=rng).tolist()


def test_the_seed_is_the_same_on_every_machine() -> None:
    """The words of the id's SHA-256; Python's own hash() differs from process to process."""
    assert query_seed(42, "q1") == [42, 3253231047, 1387185079, 1729235282, 3215537831]


@pytest.mark.parametrize("strategy", ["random", "weighted"])
def test_the_draw_is_a_function_of_seed_and_query_id(strategy: str) -> None:
    queries = [f"q{i}" for i in range(30)]
    forward = {query: order(strategy, 200, query_id=query) for query in queries}
    backward = {query: order(strategy, 200, query_id=query) for query in reversed(queries)}
    assert forward == backward
    assert len({tuple(found) for found in forward.values()}) == len(queries)
    assert order(strategy, 200, seed=43) != forward["q1"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [0, 1, 2, 57])
def test_every_place_is_in_the_order_once(strategy: str, number: int) -> None:
    assert sorted(order(strategy, number)) == list(range(number))


def test_top_is_by_rank() -> None:
    assert order("top", 9) == list(range(9))
    found = draw_order(np.array([7, 3, 3, 9, 1]), strategy="top", rng=np.random.default_rng(0))
    assert found.tolist() == [4, 1, 2, 0, 3]


def test_another_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="sampling_strategy: found 'best', allowed: random, top, weighted"):
        order("best", 3)


@pytest.mark.parametrize("strategy", ["random", "weighted"])
def test_every_order_of_three_is_as_likely_as_the_strategy_says(strategy: str) -> None:
    """6 standard deviations of 6000 draws; weighted: w1/(w1+w2+w3) x w2/(w2+w3) for w = 1, 1/2, 1/3."""
    drawn = Counter(tuple(order(strategy, 3, query_id=str(query))) for query in range(6000))
    weights = [1.0, 1.0, 1.0] if strategy == "random" else [1.0, 1 / 2, 1 / 3]
    for first, second, third in permutations(range(3)):
        share = weights[first] / sum(weights) * weights[second] / (weights[second] + weights[third])
        assert abs(drawn[first, second, third] - 6000 * share) < 6 * (6000 * share * (1 - share)) ** 0.5


def test_all_places_are_drawn_alike() -> None:
    """Each place is drawn 600 times of 4000 on average; 6 standard deviations are 135."""
    drawn = Counter(place for query in range(4000) for place in order("random", 100, query_id=str(query))[:15])
    assert set(drawn) == set(range(100))
    assert max(abs(count - 600) for count in drawn.values()) < 135


def test_the_first_allowed_of_the_order_are_chosen_and_put_by_rank() -> None:
    drawn = np.array([5, 2, 4, 0, 3, 1])
    allowed = np.array([True, True, False, True, True, True])
    assert choose(drawn, allowed, 3).tolist() == [0, 4, 5]
    assert choose(drawn, allowed, 0).tolist() == []
    assert choose(drawn, allowed, 9).tolist() == [0, 1, 3, 4, 5]
    assert choose(drawn, np.zeros(6, np.bool_), 3).tolist() == []
    assert choose(np.empty(0, np.int64), np.empty(0, np.bool_), 3).tolist() == []


def test_more_negatives_are_the_same_ones_and_others() -> None:
    for query in range(20):
        drawn = np.array(order("weighted", 50, query_id=str(query)))
        everything = np.ones(50, np.bool_)
        chosen = [set(choose(drawn, everything, number).tolist()) for number in range(51)]
        assert all(few < more for few, more in pairwise(chosen))


@pytest.mark.parametrize("limit", [1, 3, None])
def test_no_passage_is_chosen_more_often_than_the_limit(limit: int | None) -> None:
    rng = np.random.default_rng(0)
    uses, counted = Uses(20, limit), Counter[int]()
    for _ in range(60):
        rows = rng.permutation(20)[:8]
        free = uses.free(rows)
        assert free.tolist() == [limit is None or counted[row] < limit for row in rows.tolist()]
        uses.count(rows[free][:3])
        counted.update(rows[free][:3].tolist())
    assert max(counted.values()) == limit or limit is None
    rows, counts = uses.most_used(30)
    assert dict(zip(rows.tolist(), counts.tolist(), strict=True)) == counted


def test_a_row_that_is_counted_twice_at_once_counts_twice() -> None:
    uses = Uses(5, 2)
    uses.count(np.array([3, 1, 3]))
    assert uses.free(np.array([0, 1, 3, 3])).tolist() == [True, True, False, False]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 9])
def test_the_most_used_come_first_and_ties_by_row(number: int) -> None:
    uses = Uses(10, None)
    uses.count(np.array([4, 7, 7, 7, 2, 2, 9, 9, 0]))
    rows, counts = uses.most_used(number)
    assert rows.tolist() == [7, 2, 9, 0, 4][:number]
    assert counts.tolist() == [3, 2, 2, 1, 1][:number]


def test_the_summary_counts_passages_that_were_chosen() -> None:
    uses = Uses(10, None)
    assert uses.summary() == {"passages": 0, "median": 0.0, "most": 0}
    assert [values.tolist() for values in uses.most_used(3)] == [[], []]
    uses.count(np.array([4, 7, 7, 7, 2, 2]))
    assert uses.summary() == {"passages": 3, "median": 2.0, "most": 3}
