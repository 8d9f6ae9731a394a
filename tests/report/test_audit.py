"""audit.html: what mining hands over is on the page, escaped, and nothing is loaded."""

import re

import pytest

from rayembed.report import audit_page, plots
from tests.report.test_page import ATTACK, Structure

HISTOGRAMS = {"ranks": [3, 0, 1, 0, 0], "negative_scores": [0, 1, 3, 0], "positive_scores": [0, 0, 0, 1]}
STATS = {"queries": 2, "filled_up": 1234, "dropped": {"positive_id": 5678}}
EXAMPLES = [
    {
        "query": "what is rain",
        "positives": ["water that falls", "a second one"],
        "negatives": [
            {"id": "c1", "text": "a cloud", "rank": 14, "score": 0.51234},
            {"id": "c2", "text": "a stone", "rank": None, "score": None},
        ],
    }
]


def page(**changed: object) -> str:
    content = {"stats": STATS, "histograms": HISTOGRAMS, "examples": EXAMPLES} | changed
    return audit_page("a title", **content, window=(10, 60))  # type: ignore[arg-type]


def test_counts_reasons_and_examples_are_there() -> None:
    text = Structure(page()).text
    for found in ("a title", "1,234", "positive id", "5,678", "what is rain", "water that falls", "a second one"):
        assert found in text
    assert re.search(r"rank 14, score 0.512\s*c1\s*a cloud", text)
    assert re.search(r"filled up\s*c2\s*a stone", text)
    assert "Of 4 negatives from the window; 1,234 that filled up" in text
    assert "the 1 positives" in text


def test_both_plots_have_their_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[list[float], dict[str, list[int]]]] = {}

    def histogram(name: str, edges: list[float], counts: dict[str, list[int]], **_: str) -> str:
        drawn[name] = (edges, counts)
        return name

    monkeypatch.setattr(plots, "histogram", histogram)
    page()
    assert drawn == {
        "ranks": ([10, 20, 30, 40, 50, 60], {"negatives": [3, 0, 1, 0, 0]}),
        "scores": ([-1, -0.5, 0, 0.5, 1], {"negatives": [0, 1, 3, 0], "positives": [0, 0, 0, 1]}),
    }


def test_nothing_known_is_a_page_too() -> None:
    empty = {name: [0] * len(counts) for name, counts in HISTOGRAMS.items()}
    text = Structure(page(histograms=empty, examples=[])).text
    assert "Of 0 negatives" in text
    assert "No row to show" in text


def test_page_loads_nothing_escapes_everything_and_is_the_same_again() -> None:
    negative = {"id": ATTACK, "text": ATTACK, "rank": 1, "score": 0.5}
    row = {"query": ATTACK, "positives": [ATTACK], "negatives": [negative]}
    found = page(stats=STATS | {ATTACK: 1}, examples=[row])
    structure = Structure(found)
    assert not structure.tags & {"script", "link", "iframe", "img"}
    assert structure.text.count(ATTACK) == 5
    assert "//" not in found
    ids = [value for name, value in structure.attributes if name == "id"]
    assert len(set(ids)) == len(ids) > 20
    assert found == page(stats=STATS | {ATTACK: 1}, examples=[row])
