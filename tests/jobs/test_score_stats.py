"""Distributions that add up, against numpy over all scores; rows that lack a score; no Ray."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.data.store import ROWS, StoreWriter
from rayembed.jobs import score
from rayembed.jobs.score import RowPairs, WriteWorker, row_pairs
from rayembed.jobs.score_stats import added, distribution, summary, warnings

RNG = np.random.default_rng(0)


def of_parts(scores: NDArray[np.floating]) -> dict[str, object]:
    """As units bring it: in parts, an empty one among them, through JSON."""
    parts = [distribution(part.tolist()) for part in np.split(scores, [0, 3, len(scores) // 2])]
    return added(json.loads(json.dumps(parts)))


@pytest.mark.parametrize("shift", [-11.0, 0.0, 3.0])
def test_a_summary_is_that_of_all_scores(shift: float) -> None:
    scores = (RNG.normal(size=5000) * 4 + shift).astype(np.float32)
    found = summary(of_parts(scores))
    assert (found["count"], found["min"], found["max"]) == (5000, scores.min(), scores.max())
    assert found["mean"] == pytest.approx(scores.mean(dtype=np.float64), abs=1e-9)
    assert found["std"] == pytest.approx(scores.std(dtype=np.float64), abs=1e-9)
    for name, value in found["quantiles"].items():
        exact = np.quantile(scores, float(name[:-1]) / 100, method="inverted_cdf")
        assert value == pytest.approx(exact, rel=1 / 256, abs=1e-30)
    assert list(found["quantiles"]) == ["1%", "5%", "25%", "50%", "75%", "95%", "99%"]
    assert warnings(of_parts(scores)) == []


def test_signs_and_zeros_are_in_order() -> None:
    scores = np.array([-2.5, -0.0, 0.0, 1e-40, 7.0, -1e30, 1e30], np.float32)
    quantiles = list(summary(of_parts(scores))["quantiles"].values())
    assert quantiles == sorted(quantiles)
    assert (quantiles[0], quantiles[-1]) == pytest.approx((-1e30, 1e30), rel=1 / 256)
    assert quantiles[3] == pytest.approx(0, abs=1e-38)


def test_no_scores_are_counted() -> None:
    assert summary(added([])) == {"count": 0}
    assert warnings(added([])) == []


def test_scores_that_are_all_alike_are_told() -> None:
    scores = 9 + RNG.normal(size=1000) * 5e-5
    assert "collapsed: the standard deviation of 1000 is" in warnings(of_parts(scores))[0]
    assert warnings(of_parts(9 + (scores - 9) * 10)) == []


def test_scores_at_the_ends_of_their_range_are_told() -> None:
    scores = 1 / (1 + np.exp(-RNG.normal(size=1000) * 12))  # a sigmoid that got what was far too large for it
    assert "saturated: " in warnings(of_parts(scores))[0]
    assert warnings(of_parts(scores[:60])) == [], "too few to tell"
    assert warnings(of_parts(1 / (1 + np.exp(-RNG.normal(size=1000))))) == []


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_pairs_are_cut_the_same_however_rows_are(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares a batch decides the last bits of a score under bfloat16."""
    monkeypatch.setattr(score, "ROWS_PER_PART", 2)
    writer = StoreWriter(tmp_path / "rows", ROWS, cut)
    for i in range(5):
        writer.add({"query_id": f"q{i}", "query": f"q{i}", "pos": ["a"], "neg": ["b"] * i, "dataset": "d"})
    source = row_pairs(writer.finish(), None)
    assert (source.parts, source.sizes) == (3, (3, 7, 5))
    pairs = RowPairs(**source.arguments)
    found = [pairs.pairs(part) for part in range(3)]
    assert found[0] == [("q0", "a"), ("q1", "a"), ("q1", "b")]
    assert tuple(map(len, found)) == source.sizes
    assert found[2] == [("q4", "a"), *[("q4", "b")] * 4]


def test_a_row_without_a_score_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "rows", ROWS, 2)
    for i in range(3):
        writer.add({"query_id": f"q{i}", "query": f"q{i}", "pos": ["a"], "neg": ["b"] * i, "dataset": "d"})
    rows = writer.finish()
    folders = {"everything": str(rows.folder), "rows": str(rows.folder), "scores": str(tmp_path / "none")}
    worker = WriteWorker(**folders, wording=None, threads=1, use_gpu=False)
    with pytest.raises(ValueError, match=r"3 of 3 pairs have no score in .*none, among them query 'q0'; the cache was"):
        worker({"part": 0}, "part-00000", tmp_path)
