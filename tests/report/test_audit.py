"""audit.html: what mining hands over is on the page, escaped, and nothing is loaded."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rayembed.mining.audit import Mined, Negative, figures, part_audit, summed
from rayembed.report import audit_page, plots
from rayembed.report.audit import MOST_BINS, binned
from rayembed.report.audit_verdict import Verdict, share, verdict
from tests.report.test_page import ATTACK, Structure

WINDOW = (10, 60)
USED = [{"id": "c9", "text": "a passage for everyone", "uses": 4321}, {"id": "c8", "text": "the next", "uses": 3}]
RAIN = Mined(
    query_id="q-rain",
    query="what is rain",
    positives=["water that falls", "a second one"],
    positive_ids=["p1", "p2"],
    positive_scores=[0.75, 0.5],
    positive_teacher=[4.0, 2.5],
    negatives=[
        Negative(1, "c1", "a cloud", 14, 0.51234, 0.25),
        Negative(2, "c2", "drops of water", 15, 0.25, 3.0),
        Negative(3, "c3", "a stone", None, None, None),
    ],
    wanted=5,
    dropped={"positive_id": 5678, "max_score": 2},
)
SNOW = Mined("q-snow", "what is snow", ["white"], ["p3"], [None], [None], [], 5, {"query_text": 1, "max_score": 0})


def audit_of(*mined: Mined) -> dict[str, Any]:
    return summed([part_audit(mined, first_rank=WINDOW[0], last_rank=WINDOW[1], shown=range(len(mined)))])


def page(*mined: Mined, most_used: Sequence[dict[str, Any]] = USED, **stats: object) -> str:
    audit = audit_of(*mined)
    return audit_page("a title", figures(audit) | stats, audit, most_used, window=WINDOW)


def test_verdict_and_counts_are_there() -> None:
    uses = {"passages": 77, "most": 4321}
    text = Structure(page(RAIN, SNOW, passages=123_456, uses=uses, dropped={"positive_id": 5678, "never": 0})).text
    for found in (
        "a title",
        "3 negatives for 2 queries, from ranks 10 to 59 of 123,456 passages.",
        "Suspected false negatives: 2 (66.7 %).",
        "1 of 2 (50 %) score at or above the lowest positive",
        "the teacher puts 1 of the 2 that it judged (50 %) at or above a positive",
        "2 queries short by 7 negatives in all; 1 negative drawn at random to fill up 1 query.",
        "5,678 candidates dropped, most by positive id (5,678, 100 %).",
        "77 passages of the corpus serve as a negative; the most used one serves 4,321 queries.",
        "Of 2 negatives from the window; 1 that filled up have no rank.",
        "Of 2 negatives and 2 positives.",
    ):
        assert found in text
    assert re.search(r"by filter\s*positive id\s*5,678\s*never\s*0\s*Suspected", text)
    assert re.search(r"4,321\s*a passage for everyone\s*c9", text)
    assert re.search(r"suspected false negatives\s*2\n", text)


def test_suspected_pairs_stand_side_by_side_the_teachers_first() -> None:
    text = Structure(page(RAIN)).text
    by_teacher, by_score = text.index("By the teacher"), text.index("By score")
    assert by_teacher < by_score
    assert "1 of 2 pairs (50 %)." in text[by_teacher:by_score]
    assert re.search(
        r"query q-rain; 0\.5 above the positive, the lowest of 2\s*"
        r"positive p2, score 0\.500, teacher 2\.500\s*a second one\s*"
        r"negative c2, rank 15, score 0\.250, teacher 3\.000\s*drops of water",
        text[by_teacher:by_score],
    )
    assert re.search(r"q-rain; 0\.0123 above[^;]*a second one\s*negative c1, rank 14, score 0\.512", text[by_score:])


def test_a_list_that_is_cut_says_so() -> None:
    many = Mined("q", "many", ["p"], ["i"], [0.1], [None], [RAIN.negatives[0]] * 30, 30, {})
    text = Structure(page(many)).text
    assert "The teacher judged no pair." in text[text.index("By the teacher") : text.index("By score")]
    assert "30 of 30 pairs (100 %), the worst 20 of them below." in text
    assert "the worst" not in Structure(page(RAIN)).text


def test_examples_show_every_text_and_what_is_known_of_it() -> None:
    text = Structure(page(RAIN)).text
    shown = text[text.index("Examples at random") :]
    assert re.search(r"what is rain\s*q-rain\s*positive\s*score 0\.750, teacher 4\.000\s*p1\s*water that falls", shown)
    assert re.search(r"rank 14, score 0\.512, teacher 0\.250\s*c1\s*a cloud", shown)
    assert re.search(r"filled up\s*c3\s*a stone", shown)
    assert "more" not in shown
    many = Mined("q", "many", ["p"] * 9, ["i"] * 9, [0.9] * 9, [None] * 9, [RAIN.negatives[0]] * 30, 30, {})
    text = Structure(page(many)).text
    shown = text[text.index("Examples at random") :]
    assert re.search(r"positives\s*and 6 more", shown)
    assert re.search(r"negatives\s*and 10 more", shown)


def test_queries_with_too_few_say_how_many_they_got_and_what_was_dropped() -> None:
    text = Structure(page(RAIN, SNOW)).text
    shown = text[text.index("Queries with too few negatives") : text.index("Most used")]
    first = r"2\s*1\s*what is rain\s*q-rain\s*2 of 5 from the window; dropped: positive id 5,678, max score 2"
    assert re.search(
        first + r"\s*5\s*0\s*what is snow\s*q-snow\s*0 of 5 from the window; dropped: query text 1\s*$", shown
    )


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        ({"suspected_by_teacher": 51}, "mine.denoise drops such"),
        ({"suspected_by_score": 101}, "the model is weak"),
        ({"positives_without_score": 201}, "20.1 % of the positives have no score"),
        ({"filled_up": 51}, "lower mine.negative_number"),
        ({"queries_short": 11}, "set mine.fill_up"),
        ({"negatives": 0}, "no negative at all"),
    ],
)
def test_what_is_above_its_bound_is_named_with_the_setting(changed: dict[str, int], setting: str) -> None:
    def of(counts: dict[str, int]) -> Verdict:
        audit = audit_of(RAIN)
        thousand = ("queries", "negatives", "positives", "judged_pairs", "compared_pairs")
        audit["counts"] = dict.fromkeys(audit["counts"], 0) | dict.fromkeys(thousand, 1000) | counts
        return verdict(figures(audit), audit, window=WINDOW)

    at_the_bound = {name: count - 1 for name, count in changed.items() if count}
    assert (of(at_the_bound).kind, of(at_the_bound).concerns) == ("better", [])
    assert of(changed).kind == "worse"
    assert len(of(changed).concerns) == 1
    assert setting in of(changed).concerns[0]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 9, "0 %"), (9, 9, "100 %"), (1, 3, "33.3 %"), (1, 300, "0.33 %"), (1, 10**6, "less than 0.01 %"), (0, 0, "–")],  # noqa: RUF001
)
def test_shares_have_the_digits_that_they_need(part: int, whole: int, text: str) -> None:
    assert share(part, whole) == text


@pytest.mark.parametrize(("queries", "most", "named"), [(1000, 50, False), (1000, 51, True), (10, 20, False)])
def test_a_passage_that_serves_too_many_queries_is_named(queries: int, most: int, named: bool) -> None:
    audit = audit_of(RAIN)
    audit["counts"] = dict.fromkeys(audit["counts"], 0) | {"queries": queries, "negatives": 15}
    stats = figures(audit) | {"uses": {"passages": 9, "most": most}}
    assert ("mine.max_uses" in " ".join(verdict(stats, audit, window=WINDOW).concerns)) == named


def test_every_plot_has_its_axis_and_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[list[float], dict[str, list[int]], float | None]] = {}

    def histogram(
        name: str, edges: list[float], counts: dict[str, list[int]], *, mark: float | None = None, **_: str
    ) -> str:
        drawn[name] = (edges, counts, mark)
        return name

    monkeypatch.setattr(plots, "histogram", histogram)
    page(RAIN)
    ranks = [0] * 50
    ranks[4] = ranks[5] = 1
    assert drawn["ranks"] == (list(range(10, 61)), {"negatives": ranks}, None)
    for name, sides, mark in (
        ("scores", {"negatives": [0.25, 0.512], "positives": [0.5, 0.75]}, None),
        ("margins", {"negatives": [-0.012, 0.25]}, 0),
        ("teacher_margins", {"negatives": [-0.5, 2.25]}, 0),
    ):
        edges, counts, found = drawn[name]
        assert found == mark
        for side, values in sides.items():
            places = np.searchsorted(np.array(edges) - 1e-9, values, side="right") - 1
            assert [i for i, count in enumerate(counts[side]) if count] == places.tolist()


@pytest.mark.parametrize(
    ("low", "high"), [(-0.3, 0.9), (0.61, 0.68), (0.5, 0.5), (-12, 12), (55, 790), (-1, 1), (0, 0), (0, 5e-3)]
)
def test_bins_hold_every_value_and_are_equal_and_few(low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    values = np.array([float(f"{value:.3g}") for value in rng.uniform(low, high, 300)])
    histograms = {side: {str(v): n for v, n in zip(*np.unique(own, return_counts=True), strict=True)}
                  for side, own in (("negatives", values[:200]), ("positives", values[200:]))}  # fmt: skip
    edges, counts = binned(histograms)
    assert [sum(own) for own in counts.values()] == [200, 100]
    assert np.allclose(np.diff(edges), edges[1] - edges[0])
    assert len(edges) <= MOST_BINS + 2
    assert min(np.sum(list(counts.values()), axis=0)[[0, -1]]) > 0, "no empty bins at the ends"
    if high - low > 0.1:
        assert len(edges) > 10
    shifted = np.array(edges) - 1e-9 * max(abs(low), abs(high), 1)  # a value at an edge belongs to the bin on its right
    for side, own in (("negatives", values[:200]), ("positives", values[200:])):
        assert counts[side] == np.histogram(own, bins=shifted)[0].tolist()


@pytest.mark.parametrize(("step", "low"), [(0.001, 0.61), (0.01, 4.0), (1.0, 790.0)])
def test_no_bin_is_narrower_than_five_steps_of_the_values(step: float, low: float) -> None:
    values = [f"{low + i * step:.3g}" for i in range(10)]
    edges, counts = binned({"negatives": dict.fromkeys(values, 3)})
    assert edges[1] - edges[0] == pytest.approx(5 * step)
    assert counts == {"negatives": [15, 15]}


def test_nothing_known_is_a_page_too() -> None:
    nothing = Structure(page(SNOW, most_used=[])).text
    for found in (
        "no negative at all",
        "No score and no rank is known.",
        "no pair has scores to compare; the teacher judged none",
        "The teacher judged no pair.",
        "No passage was used.",
    ):
        assert found in nothing
    fine = Mined("q", "fine", ["p"], ["i"], [0.9], [None], [RAIN.negatives[0]], 1, {})
    text = Structure(page(fine)).text
    assert "None: every query has as many" in text
    assert "No candidate was dropped." in text
    assert "Every query has as many as were asked for" in text
    assert "0 of 1 pairs (0 %)." in text


def test_page_loads_nothing_escapes_everything_and_is_the_same_again() -> None:
    negative = Negative(0, ATTACK, ATTACK, 14, 0.9, 1.0)
    row = Mined(ATTACK, ATTACK, [ATTACK], [ATTACK], [0.5], [0.5], [negative], 2, {ATTACK: 1})
    used = [{"id": ATTACK, "text": ATTACK, "uses": 1}]
    found = page(row, most_used=used, teacher=ATTACK)
    structure = Structure(found)
    assert not structure.tags & {"script", "link", "iframe", "img"}
    # query and its id, positive and negative with theirs: twice suspected and once an example; short; used; drops
    assert structure.text.count(ATTACK) == 3 * 6 + 3 + 2 + 4
    assert "//" not in found
    ids = [value for name, value in structure.attributes if name == "id"]
    assert len(set(ids)) == len(ids) > 20
    assert found == page(row, most_used=used, teacher=ATTACK)
