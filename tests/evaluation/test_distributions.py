"""similarity_summary against counts in plain Python."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from rayembed.evaluation.distributions import similarity_summary

GENERATOR = np.random.default_rng(0)
POSITIVES = np.round(GENERATOR.normal(0.6, 0.1, size=80), 2)  # rounded: some equal a negative
NEGATIVES = np.round(GENERATOR.normal(0.4, 0.2, size=150), 2)


def reference(positives: list[float], negatives: list[float], edges: list[float]) -> dict[str, Any]:
    """Overlap and AUC by counting; the last bin holds its upper edge."""

    def shares(values: list[float]) -> list[float]:
        inside = [
            sum(low <= value < high or (value == high == edges[-1]) for value in values)
            for low, high in itertools.pairwise(edges)
        ]
        return [count / len(values) for count in inside]

    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return {
        "positives": shares(positives),
        "negatives": shares(negatives),
        "overlap": sum(map(min, shares(positives), shares(negatives))),
        "auc": wins / (len(positives) * len(negatives)),
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_matches_plain_counts(dtype: type[np.floating[Any]]) -> None:
    positives, negatives = POSITIVES.astype(dtype), NEGATIVES.astype(dtype)
    summary = similarity_summary(positives, negatives, bins=12)
    expected = reference(positives.tolist(), negatives.tolist(), summary["edges"])
    assert len(summary["edges"]) == 13
    assert summary["edges"][0] == min(negatives.min(), positives.min())
    assert summary["edges"][-1] == max(negatives.max(), positives.max())
    assert summary["positives"]["histogram"] == pytest.approx(expected["positives"])
    assert summary["negatives"]["histogram"] == pytest.approx(expected["negatives"])
    assert summary["overlap"] == pytest.approx(expected["overlap"])
    assert summary["auc"] == pytest.approx(expected["auc"])
    assert (summary["positives"]["count"], summary["negatives"]["count"]) == (80, 150)


def test_moments_and_gap() -> None:
    summary = similarity_summary(np.array([0.5, 0.7]), np.array([0.1, 0.1, 0.4]))
    assert summary["positives"]["mean"] == pytest.approx(0.6)
    assert summary["positives"]["std"] == pytest.approx(0.1)
    assert summary["gap"] == pytest.approx(0.4)
    assert len(summary["edges"]) == 61


@pytest.mark.parametrize(
    ("positives", "negatives", "overlap", "auc"),
    [([0.9, 0.8], [0.1, 0.2], 0.0, 1.0), ([0.1], [0.9], 0.0, 0.0), ([0.5, 0.5], [0.5], 1.0, 0.5)],
)
def test_ends_of_the_scales(positives: list[float], negatives: list[float], overlap: float, auc: float) -> None:
    summary = similarity_summary(np.array(positives), np.array(negatives), bins=10)
    assert summary["overlap"] == pytest.approx(overlap)
    assert summary["auc"] == auc


def test_is_json_as_it_stands() -> None:
    summary = similarity_summary(POSITIVES.astype(np.float32), NEGATIVES.astype(np.float32))
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize("bad", [[], [0.5, float("nan")], [float("inf")]])
def test_refuses_nothing_and_what_is_not_finite(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="negatives holds"):
        similarity_summary(POSITIVES, np.array(bad))
