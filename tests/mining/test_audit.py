"""What the audit counts, whom it suspects, what it shows, and that it does not know how rows were cut into units."""

import json
import random
import statistics
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from rayembed.mining.audit import (
    COUNTS,
    EXAMPLES,
    LISTED,
    NEGATIVES_LISTED,
    POSITIVES_LISTED,
    TEXT_LIMIT,
    Mined,
    Negative,
    example_rows,
    figures,
    part_audit,
    rank_bins,
    summed,
    table,
)

WINDOW = {"first_rank": 10, "last_rank": 210}


def negative(name: str, score: float | None = None, *, rank: int | None = 12, teacher: float | None = None) -> Negative:
    return Negative(7, name, f"text of {name}", rank if score is not None else None, score, teacher)


def query(*negatives: Negative, scores: list[float | None], teacher: list[float | None] | None = None) -> Mined:
    """A query whose positives are named p0, p1, ... with the given scores."""
    names = [f"p{i}" for i in range(len(scores))]
    judged = teacher or [None] * len(scores)
    texts = [f"text of {name}" for name in names]
    return Mined("q", "a query", texts, names, scores, judged, list(negatives), len(negatives), {})


def random_mined(number: int, seed: int = 0) -> list[Mined]:
    """Queries with everything that can be: unknown scores, ties, fill-ups, missing negatives, judged ones."""
    rng = random.Random(seed)

    def score() -> float:
        return rng.choice([rng.uniform(-1, 1), round(rng.uniform(-0.3, 0.3), 1), rng.gauss(0, 20)])

    def known(share: float) -> float | None:
        return score() if rng.random() < share else None

    found = []
    for i in range(number):
        positives = rng.randrange(1, 5)
        judged = rng.random() < 0.4
        negatives = [
            replace(negative(f"n{rng.randrange(50)}", known(0.9), rank=rng.randrange(10, 210)), teacher=known(judged))
            for _ in range(rng.randrange(6))
        ]
        found.append(
            Mined(
                f"q{rng.randrange(10**6)}-{i}",
                "what " * rng.randrange(1, 200),
                [f"positive {place}" for place in range(positives)],
                [f"p{place}" for place in range(positives)],
                [known(0.8) for _ in range(positives)],
                [known(judged) for _ in range(positives)],
                negatives,
                5,
                {name: rng.randrange(1, 9) for name in rng.sample(["positive_id", "query_text", "max_score"], 2)},
            )
        )
    return found


def audit_of(mined: list[Mined], shown: tuple[int, ...] = ()) -> dict[str, Any]:
    return summed([part_audit(mined, **WINDOW, shown=shown)])


def lowest(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return min(known) if known else None


def margins(mined: list[Mined], *, teacher: bool) -> list[float]:
    found = []
    for one in mined:
        low = lowest(one.positive_teacher if teacher else one.positive_scores)
        for n in one.negatives:
            own = n.teacher if teacher else n.score
            if low is not None and own is not None:
                found.append(low - own)
    return found


@pytest.mark.parametrize("cuts", [[1], [70], [100, 101, 250], list(range(1, 300))])
def test_parts_of_any_cut_add_up_to_the_whole(cuts: list[int]) -> None:
    mined = random_mined(300)
    shown = {3, 69, 70, 100, 299}
    bounds = [0, *cuts, len(mined)]
    parts = [
        part_audit(mined[start:end], **WINDOW, shown=[i - start for i in shown if start <= i < end])
        for start, end in pairwise(bounds)
    ]
    whole = audit_of(mined, tuple(shown))
    as_read_back = json.loads(json.dumps(parts))
    assert json.dumps(summed(as_read_back)) == json.dumps(whole)
    assert summed([summed(parts[:1]), summed(parts[1:])]) == whole, "sums of sums are right too"
    assert len(whole["suspected_by_score"]) == len(whole["suspected_by_teacher"]) == len(whole["short"]) == LISTED
    assert [entry["query_id"] for entry in whole["examples"]] == [mined[i].query_id for i in sorted(shown)]


@pytest.mark.parametrize("seed", range(3))
def test_histograms_are_those_of_numpy(seed: int) -> None:
    mined = random_mined(200, seed)
    values = {
        "negative_scores": [n.score for one in mined for n in one.negatives if n.score is not None],
        "positive_scores": [score for one in mined for score in one.positive_scores if score is not None],
        "margins": margins(mined, teacher=False),
        "teacher_margins": margins(mined, teacher=True),
    }
    audit = audit_of(mined)
    for name, own in values.items():
        found = audit["histograms"][name]
        assert sum(found.values()) == len(own) > 100
        inside = {float(key): count for key, count in found.items() if abs(float(key)) < 1}
        assert len(inside) == sum(abs(float(key)) < 1 for key in found), "no value is there twice, -0 included"
        edges = np.arange(-1000, 1001) / 1000 - 0.0005
        expected, _ = np.histogram([value for value in own if abs(value) < 0.9995], bins=edges)
        assert [inside.get(i / 1000, 0) for i in range(-1000, 1000)] == expected.tolist()
        beyond = sorted(value for value in own if abs(value) >= 0.9995)
        steps = sorted(float(key) for key, count in found.items() for _ in range(count) if abs(float(key)) >= 1)
        assert steps == pytest.approx(beyond, rel=0.005), "three digits of what is larger"


def test_values_that_round_to_zero_or_one_are_there_once() -> None:
    mined = [query(*(negative("n", score) for score in (-0.0001, 0.0, 0.0001, 0.9996, 1.0)), scores=[None])]
    assert audit_of(mined)["histograms"]["negative_scores"] == {"0.000": 3, "1": 2}


@pytest.mark.parametrize(("first", "last"), [(10, 210), (0, 7), (5, 1000), (3, 4)])
def test_ranks_are_counted_by_their_part_of_the_window(first: int, last: int) -> None:
    ranked = [negative("n", 0.1, rank=rank) for rank in range(first, last)]
    mined = [query(negative("filled up"), *ranked, scores=[0.5])]
    found = part_audit(mined, first_rank=first, last_rank=last, shown=[])["ranks"]
    bins = rank_bins(first, last)
    expected = [0] * bins
    for rank in range(first, last):
        expected[(rank - first) * bins // (last - first)] += 1
    assert found == expected
    assert sum(found) == last - first


def test_counts_are_those_of_a_slow_count() -> None:
    mined = random_mined(300)
    every = [n for one in mined for n in one.negatives]
    found = audit_of(mined)
    by_score, by_teacher = margins(mined, teacher=False), margins(mined, teacher=True)
    assert found["counts"] == {
        "queries": 300,
        "negatives": len(every),
        "filled_up": sum(n.rank is None for n in every),
        "queries_filled_up": sum(any(n.rank is None for n in one.negatives) for one in mined),
        "short_by": 5 * 300 - len(every),
        "queries_short": sum(len(one.negatives) < 5 for one in mined),
        "positives": sum(len(one.positives) for one in mined),
        "positives_without_score": sum(score is None for one in mined for score in one.positive_scores),
        "compared_pairs": len(by_score),
        "judged_queries": sum(bool(margins([one], teacher=True)) for one in mined),
        "judged_pairs": len(by_teacher),
        "suspected_false_negatives": sum(
            any(
                margin <= 0 for side in (False, True) for margin in margins([replace(one, negatives=[n])], teacher=side)
            )
            for one in mined
            for n in one.negatives
        ),
        "suspected_by_score": sum(margin <= 0 for margin in by_score),
        "suspected_by_teacher": sum(margin <= 0 for margin in by_teacher),
    }
    assert set(found["counts"]) == set(COUNTS)
    dropped = Counter[str]()
    for one in mined:
        dropped.update(one.dropped)
    assert found["dropped"] == dropped


def test_a_negative_at_or_above_the_lowest_known_positive_is_suspected() -> None:
    mined = query(
        *(negative("above", 0.75), negative("at", 0.5), negative("below", 0.49), negative("filled up")),
        scores=[0.9, None, 0.5],
    )
    found = audit_of([mined])
    assert found["counts"]["suspected_false_negatives"] == found["counts"]["suspected_by_score"] == 2
    assert found["counts"]["compared_pairs"] == 3
    assert found["suspected_by_score"][0] == {
        "query_id": "q",
        "query": "a query",
        "positives": 3,
        "positive": {"id": "p2", "text": "text of p2", "score": 0.5, "teacher": None},
        "negative": {"id": "above", "text": "text of above", "rank": 12, "score": 0.75, "teacher": None},
        "margin": -0.25,
    }
    assert [entry["negative"]["id"] for entry in found["suspected_by_score"]] == ["above", "at"]
    assert found["suspected_by_teacher"] == []


def test_the_teacher_suspects_by_its_own_scores_and_a_pair_counts_once() -> None:
    mined = query(
        negative("both", 0.8, teacher=7.0),
        negative("teacher alone", teacher=3.0),
        negative("score alone", 0.7, teacher=2.5),
        negative("not judged", 0.1),
        scores=[0.6, 0.65],
        teacher=[5.0, 3.0],
    )
    found = audit_of([mined])
    names = ("suspected_false_negatives", "suspected_by_score", "suspected_by_teacher", "judged_pairs")
    assert [found["counts"][name] for name in names] == [3, 2, 2, 3]
    assert [(e["negative"]["id"], e["margin"]) for e in found["suspected_by_teacher"]] == [
        ("both", -4.0),
        ("teacher alone", 0.0),
    ]
    assert {entry["positive"]["id"] for entry in found["suspected_by_teacher"]} == {"p1"}
    assert {entry["positive"]["id"] for entry in found["suspected_by_score"]} == {"p0"}


@pytest.mark.parametrize("teacher", [False, True])
def test_the_worst_pairs_are_listed_ties_by_query_and_id(teacher: bool) -> None:
    mined = random_mined(300)
    expected = []
    for one in mined:
        for n in one.negatives:
            for margin in margins([replace(one, negatives=[n])], teacher=teacher):
                if margin <= 0:
                    expected.append((margin, one.query_id, n.id))
    found = audit_of(mined)["suspected_by_teacher" if teacher else "suspected_by_score"]
    assert [(e["margin"], e["query_id"], e["negative"]["id"]) for e in found] == sorted(expected)[:LISTED]

    tied = [replace(query(negative("b", 0.5), negative("a", 0.5), scores=[0.5]), query_id=name) for name in "ba"]
    listed = audit_of(tied)["suspected_by_score"]
    assert [entry["query_id"] + entry["negative"]["id"] for entry in listed] == ["aa", "ab", "ba", "bb"]


def test_queries_that_are_short_come_first_and_rows_keep_their_order() -> None:
    def short(name: str, found: int, filled_up: int) -> Mined:
        chosen = [*(negative("n", 0.1) for _ in range(found)), *(negative("f") for _ in range(filled_up))]
        return replace(query(*chosen, scores=[None]), query_id=name, wanted=4, dropped={"max_score": found + 1})

    mined = [short("filled b", 3, 1), short("whole", 4, 0), short("missing z", 2, 0), short("missing a", 1, 1)]
    assert audit_of(mined)["short"] == [
        {"query_id": name, "query": "a query", "wanted": 4, "negatives": n, "filled_up": f, "dropped": {"max_score": d}}
        for name, n, f, d in (("missing z", 2, 0, 3), ("missing a", 2, 1, 2), ("filled b", 4, 1, 4))
    ]
    many = [short(f"{i:03}", 4 - i % 2, i % 2) for i in range(100)] + [short("missing", 0, 0)]
    listed = [entry["query_id"] for entry in audit_of(many)["short"]]
    assert listed == ["missing", *(f"{i:03}" for i in range(1, 2 * LISTED - 1, 2))]


def test_rows_shown_are_drawn_by_the_seed() -> None:
    shown = example_rows(100_000, 42)
    assert len(shown) == EXAMPLES
    assert shown == example_rows(100_000, 42) != example_rows(100_000, 43)
    assert max(shown) < 100_000
    assert max(shown) - min(shown) > 50_000
    assert example_rows(3, 42) == {0, 1, 2}


def test_examples_have_cut_texts_and_say_how_many_there_are() -> None:
    long, cut = "x" * 1000, "x" * (TEXT_LIMIT - 1) + "…"
    exact = "y" * TEXT_LIMIT
    chosen = [replace(negative("a", 0.5, teacher=2.0), text=long), negative("b")]
    mined = replace(query(*chosen, scores=[None], teacher=[1.5]), query=long, positives=[exact])
    assert audit_of([mined], (0,))["examples"] == [
        {
            "query_id": "q",
            "query": cut,
            "num_positives": 1,
            "positives": [{"id": "p0", "text": exact, "score": None, "teacher": 1.5}],
            "num_negatives": 2,
            "negatives": [
                {"id": "a", "text": cut, "rank": 12, "score": 0.5, "teacher": 2.0},
                {"id": "b", "text": "text of b", "rank": None, "score": None, "teacher": None},
            ],
        }
    ]
    many = query(*(negative(f"n{i}", 0.1) for i in range(50)), scores=[0.2] * 40)
    (shown,) = audit_of([many], (0,))["examples"]
    assert (shown["num_positives"], shown["num_negatives"]) == (40, 50)
    assert (len(shown["positives"]), len(shown["negatives"])) == (POSITIVES_LISTED, NEGATIVES_LISTED)


def test_a_part_does_not_grow_with_its_texts_and_queries() -> None:
    chosen = [replace(negative(f"n{i}", 0.9), text="x" * 100_000) for i in range(15)]
    mined = [replace(query(*chosen, scores=[0.5]), wanted=20, query="y" * 100_000) for _ in range(300)]
    assert len(json.dumps(part_audit(mined, **WINDOW, shown=[]))) < 60_000


def test_the_mean_does_not_know_the_order_of_the_rows() -> None:
    mined = random_mined(500)
    means = {figures(audit_of(random.Random(i).sample(mined, 500)))["mean_negative_score"] for i in range(10)}
    assert len(means) == 1


def test_figures_are_counts_drops_mean_and_median() -> None:
    mined = random_mined(301)
    found = figures(audit_of(mined))
    small = [n.score for one in mined for n in one.negatives if n.score is not None]
    assert found["mean_negative_score"] == pytest.approx(statistics.fmean(small), abs=0.02)
    assert found["median_margin"] == pytest.approx(statistics.median(margins(mined, teacher=False)), rel=0.005)
    assert found["negatives"] == sum(len(one.negatives) for one in mined)
    assert list(found["dropped"]) == ["max_score", "positive_id", "query_text"]


@pytest.mark.parametrize(
    "scores", [[0.1], [0.1, 0.2], [0.1, 0.2, 0.4], [0.3, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.3, 0.3]]
)
def test_median_and_mean_of_few_are_exact(scores: list[float]) -> None:
    found = figures(audit_of([query(*(negative("n", score) for score in scores), scores=[0.0])]))
    assert found["median_margin"] == pytest.approx(-statistics.median(scores))
    assert found["mean_negative_score"] == pytest.approx(statistics.fmean(scores))


def test_nothing_known_is_an_audit_too() -> None:
    nothing = replace(query(scores=[]), wanted=3)
    unknown = replace(query(negative("n", 0.3), scores=[None]), positive_ids=[])
    found = audit_of([nothing, unknown], (0, 1))
    assert found["counts"]["compared_pairs"] == found["counts"]["suspected_false_negatives"] == 0
    assert found["counts"]["short_by"] == 3
    assert found["examples"][1]["positives"][0]["id"] is None
    assert audit_of([nothing])["histograms"]["negative_scores"] == {}
    measures = figures(audit_of([nothing]))
    assert (measures["mean_negative_score"], measures["median_margin"]) == (None, None)
    assert "queries" in table(measures, audit_of([nothing]))


def test_table_has_the_numbers_in_aligned_columns() -> None:
    first = query(negative("n", 0.5, teacher=3.0), negative("f"), scores=[0.4, None], teacher=[4.0, None])
    audit = audit_of([replace(first, wanted=3, dropped={"positive_id": 1234, "max_score": 5})] * 1000)
    lines = table({"passages": 123_456}, audit).splitlines()
    assert len(lines) == 12
    cells = [(line[:30].strip(), line[30:41].strip(), line[41:].strip()) for line in lines]
    assert cells == [
        ("queries", "1,000", ""),
        ("passages", "123,456", ""),
        ("negatives", "2,000", "median score 0.500"),
        ("drawn at random to fill up", "1,000", "for 1,000 queries"),
        ("missing", "1,000", "for 1,000 queries"),
        ("positives", "2,000", "median score 0.400"),
        ("without a score", "1,000", "50.00% of them"),
        ("pairs compared by score", "1,000", "median margin -0.100"),
        ("suspected false negatives", "1,000", "100.00% of them"),
        ("pairs judged by the teacher", "1,000", "median margin 1.000"),
        ("suspected false negatives", "0", "0.00% of them"),
        ("candidates dropped", "1,239,000", "positive_id 1,234,000, max_score 5,000"),
    ]
    assert {line[40] for line in lines if len(line) > 40} <= {" "}
