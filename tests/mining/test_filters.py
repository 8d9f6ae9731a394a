"""Each filter drops what its name says and nothing else; what is dropped is counted."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayembed.config.mine import MineConfig
from rayembed.mining.filters import Candidates, Query, apply_filters, filters_of, same_text

LONG = "one two three four five six seven eight nine ten eleven twelve"
QUERY = Query("what is  Rain", frozenset({"p1"}), ("Water that falls", LONG), 0.5, frozenset({"r1"}))
ALWAYS = ["rank_window", "positive_id", "related_id", "positive_text", "positive_after_title", "query_text"]
BOUNDS = {"min_score": -0.4, "max_score": 0.75, "absolute_margin": 0.125, "relative_margin": 0.25}
ALL = MineConfig(range_for_sampling="2-30", near_duplicate=0.8, **BOUNDS)


def candidates(*rows: tuple[str, str, float], first_rank: int = 0) -> Candidates:
    """(id, text, score), best first."""
    return Candidates(
        rows=np.arange(100, 100 + len(rows)),
        ids=[name for name, _, _ in rows],
        texts=[text for _, text, _ in rows],
        ranks=np.arange(first_rank, first_rank + len(rows)),
        scores=np.array([score for _, _, score in rows], np.float32),
    )


def of_scores(*scores: float) -> Candidates:
    return candidates(*((f"c{i}", f"text {i}", score) for i, score in enumerate(scores)))


def dropped_by(name: str, config: MineConfig, query: Query, some: Candidates) -> list[bool]:
    return [bool(drop) for drop in filters_of(config)[name](query, some)]


def random_candidates(rng: random.Random, number: int) -> Candidates:
    """Ids, texts and scores from few, so that all filters have something to do; scores of both signs, with ties."""
    words = LONG.split()
    near = " ".join([*words[:11], "dozen"])  # 9 of 11 grams
    texts = [
        "Water that  falls",
        "Title: water that falls",
        "A longer title: water that falls",
        "what is rain",
        LONG.upper(),
        near,
        "a b",
        "A  B",
        "a c",
    ]
    texts += [f"text {i}" for i in range(30)]
    scores = sorted((rng.randrange(-8, 9) / 8 for _ in range(number)), reverse=True)
    names = ["p1", "r1", *(f"c{i}" for i in range(40))]
    return candidates(*((rng.choice(names), rng.choice(texts), score) for score in scores))


def plain_text(text: str) -> str:
    return " ".join(text.lower().split())


def jaccard(one: str, other: str) -> float:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = plain_text(text).split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    both = grams(one) | grams(other)
    return len(grams(one) & grams(other)) / len(both) if both else 0.0


def after_title(text: str, positive: str) -> bool:
    return text.endswith(" " + positive) and (len(positive.split()) > 4 or len(positive) / len(text) >= 0.5)


POSITIVES = [plain_text(text) for text in QUERY.positive_texts]
RULES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "rank_window": lambda c: not 2 <= c["rank"] < 30,
    "positive_id": lambda c: c["id"] == "p1",
    "related_id": lambda c: c["id"] == "r1",
    "positive_text": lambda c: plain_text(c["text"]) in POSITIVES,
    "positive_after_title": lambda c: any(after_title(plain_text(c["text"]), text) for text in POSITIVES),
    "query_text": lambda c: plain_text(c["text"]) == "what is rain",
    "near_duplicate": lambda c: max(jaccard(c["text"], text) for text in QUERY.positive_texts) >= 0.8,
    "min_score": lambda c: c["score"] < -0.4,
    "max_score": lambda c: c["score"] > 0.75,
    "absolute_margin": lambda c: c["score"] > 0.375,
    "relative_margin": lambda c: c["score"] > 0.375,
}


def columns(some: Candidates) -> list[dict[str, Any]]:
    every = zip(some.rows, some.ids, some.texts, some.ranks, some.scores, strict=True)
    return [dict(zip(("row", "id", "text", "rank", "score"), values, strict=True)) for values in every]


@pytest.mark.parametrize("name", RULES)
def test_every_filter_is_its_rule(name: str) -> None:
    rng = random.Random(name)
    verdicts = Counter[bool]()
    for number in (0, 1, 40, 40, 40):
        some = random_candidates(rng, number)
        found = dropped_by(name, ALL, QUERY, some)
        assert found == [RULES[name](candidate) for candidate in columns(some)]
        verdicts.update(found)
    assert min(verdicts[True], verdicts[False]) > 0


@pytest.mark.parametrize("seed", range(20))
def test_filters_are_applied_one_after_the_other_and_every_candidate_is_accounted_for(seed: int) -> None:
    some = random_candidates(random.Random(seed), 40)
    kept, dropped = apply_filters(filters_of(ALL), QUERY, some)
    expected, reasons, met = [], Counter[str](), set[str]()
    for candidate in columns(some):
        reason = next((name for name in filters_of(ALL) if name in RULES and RULES[name](candidate)), None)
        if reason is None and plain_text(candidate["text"]) in met:
            reason = "repeated_text"
        if reason is None:
            met.add(plain_text(candidate["text"]))
            expected.append(candidate)
        else:
            reasons[reason] += 1
    assert columns(kept) == expected
    assert dropped == reasons
    assert len(kept.ids) + dropped.total() == len(some.ids)


def test_the_order_of_the_filters() -> None:
    bounded = ["near_duplicate", "min_score", "max_score", "absolute_margin", "relative_margin"]
    assert list(filters_of(ALL)) == [*ALWAYS, *bounded, "repeated_text"]


def test_settings_that_are_null_give_no_filter() -> None:
    assert list(filters_of(MineConfig(near_duplicate=None))) == [*ALWAYS, "repeated_text"]
    for name, bound in {**BOUNDS, "near_duplicate": 0.5}.items():
        config = replace(MineConfig(near_duplicate=None), **{name: bound})
        assert list(filters_of(config)) == [*ALWAYS, name, "repeated_text"]
    zero = MineConfig(near_duplicate=None, min_score=0.0, absolute_margin=0.0)
    assert list(filters_of(zero)) == [*ALWAYS, "min_score", "absolute_margin", "repeated_text"]


@pytest.mark.parametrize(
    ("name", "dropped", "kept"),
    [
        ("positive_id", ("p1", "a cloud"), ("p11", "two clouds")),
        ("related_id", ("r1", "a cloud"), ("r", "two clouds")),
        ("positive_text", ("c", " water\tTHAT\n falls "), ("c", "water that fell")),
        ("positive_after_title", ("c", "Rain:\ta title  Water that\nfalls"), ("c", "rainwater that falls")),
        ("near_duplicate", ("c", LONG.replace(" ", ", ") + ", thirteen"), ("c", LONG.replace("six", "6"))),
        ("query_text", ("c", "what is RAIN"), ("c", "what is rain?")),
    ],
)
def test_each_filter_drops_its_own(name: str, dropped: tuple[str, str], kept: tuple[str, str]) -> None:
    some = candidates((*dropped, 0.1), (*kept, 0.0))
    filters = filters_of(MineConfig(range_for_sampling="0-9"))
    verdicts = {other: drops(QUERY, some).tolist() for other, drops in filters.items()}
    also = {"positive_text": {"near_duplicate"}}.get(name, set())  # the same is near, too
    assert verdicts == {other: [other in {name, *also}, False] for other in filters}


@pytest.mark.parametrize(
    ("positive", "candidate", "dropped"),
    [
        ("Yes", "Is it safe to take aspirin every day? Yes", False),
        ("Yes", "Ok: yes", False),  # 3 of 7 characters
        ("Yes", "Q: yes", True),  # 3 of 6
        ("take it with food", "Aspirin and stomach ache: take it with food", False),  # 4 words
        ("take it with some food", "Aspirin and stomach ache: take it with some food", True),
    ],
)
def test_a_short_positive_drops_only_what_it_is_most_of(positive: str, candidate: str, dropped: bool) -> None:
    query = replace(QUERY, positive_texts=("nothing of the kind", positive))
    assert dropped_by("positive_after_title", MineConfig(), query, candidates(("c", candidate, 0.1))) == [dropped]


def test_the_first_of_equals_stays_and_what_another_filter_drops_is_none_of_them() -> None:
    some = candidates(("p1", "a cloud", 0.5), ("c1", "A  cloud", 0.4), ("c2", "a cloud", 0.3))
    kept, dropped = apply_filters(filters_of(MineConfig(range_for_sampling="0-9")), QUERY, some)
    assert kept.ids == ["c1"]
    assert dropped == {"positive_id": 1, "repeated_text": 1}


def test_a_passage_without_rank_and_score_is_dropped_by_no_bound() -> None:
    nan = math.nan
    drawn = Candidates(np.array([3]), ["c"], ["a cloud"], np.array([-1]), np.array([nan], np.float32))
    kept, dropped = apply_filters(filters_of(ALL), QUERY, drawn)
    assert (kept.ids, dropped) == (["c"], {})


@pytest.mark.parametrize("bound", [0.7, -0.7, 0.1, -0.3])
def test_a_candidate_exactly_at_a_bound_stays(bound: float) -> None:
    """Bounds such as 0.7 are no float32: they are rounded as the scores are."""
    at = np.float32(bound)
    some = of_scores(float(np.nextafter(at, np.float32(9))), float(at), float(np.nextafter(at, np.float32(-9))))
    assert dropped_by("max_score", MineConfig(max_score=bound), QUERY, some) == [True, False, False]
    assert dropped_by("min_score", MineConfig(min_score=bound), QUERY, some) == [False, False, True]
    query = replace(QUERY, positive_score=bound + 0.25)
    assert dropped_by("absolute_margin", MineConfig(absolute_margin=0.25), query, some) == [True, False, False]


@pytest.mark.parametrize(("positive", "bound"), [(0.8, 0.76), (-0.8, -0.84), (0.0, 0.0)])
def test_the_relative_margin_lies_below_the_positive_whatever_its_sign(positive: float, bound: float) -> None:
    at = np.float32(bound)
    some = of_scores(float(np.nextafter(at, np.float32(9))), float(at), bound - 0.1)
    query = replace(QUERY, positive_score=positive)
    assert dropped_by("relative_margin", MineConfig(relative_margin=0.05), query, some) == [True, False, False]


@pytest.mark.parametrize("name", ["absolute_margin", "relative_margin"])
def test_margins_drop_nothing_where_the_positives_score_is_not_known(name: str) -> None:
    query = replace(QUERY, positive_score=None)
    assert dropped_by(name, replace(MineConfig(), **{name: 0.5}), query, of_scores(9.0, 0.5, -0.5)) == [False] * 3


def test_candidates_kept_keep_all_that_is_theirs() -> None:
    some = random_candidates(random.Random(0), 9)
    mask = np.array([i % 3 == 1 for i in range(9)])
    assert columns(some.keep(mask)) == [columns(some)[i] for i in (1, 4, 7)]
    assert some.keep(~mask).scores.dtype == np.float32
    assert columns(some.keep(np.zeros(9, np.bool_))) == []


def test_what_makes_texts_the_same() -> None:
    assert same_text(" a \n b\u3000c ") == "a b c"
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "strasse")
    assert len({same_text(text) for text in ("Straße ﬁx", "STRASSE fix", "strasse\tﬁx", f"{wide} fix")}) == 1
    assert len({same_text(text) for text in ("a b", "a b.", "ab", "á b")}) == 4
