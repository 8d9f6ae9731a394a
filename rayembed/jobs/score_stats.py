"""How scores are distributed, in counts that add up over units: no process holds all scores.

A bin is what scores have in common in their 16 upper bits (sign, exponent, 7 bits of the mantissa), so that bins need
no bounds beforehand and a score is known to 1 part in 256.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
COLLAPSED = 1e-4  # standard deviation; float32 scores of different pairs are further apart
END, SATURATED, ENOUGH = 0.005, 0.5, 100  # half of 100 scores in the outermost 0.5 % of the range are no accident


def distribution(scores: Sequence[float]) -> dict[str, Any]:
    """Counts and sums of scores, as JSON."""
    values = np.asarray(scores, np.float32)
    wide = values.astype(np.float64)
    bins, counts = np.unique(_bins(values), return_counts=True)
    return {
        "count": len(values),
        "sum": float(wide.sum()),
        "squares": float((wide**2).sum()),
        "min": float(values.min()) if len(values) else math.inf,
        "max": float(values.max()) if len(values) else -math.inf,
        "bins": dict(zip(map(str, bins.tolist()), counts.tolist(), strict=True)),
    }


def added(distributions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One distribution of several."""
    bins: Counter[str] = Counter()
    for one in distributions:
        bins.update(one["bins"])
    return {
        **{key: math.fsum(one[key] for one in distributions) for key in ("sum", "squares")},
        "count": sum(one["count"] for one in distributions),
        "min": min((one["min"] for one in distributions), default=math.inf),
        "max": max((one["max"] for one in distributions), default=-math.inf),
        "bins": bins,
    }


def summary(of: dict[str, Any]) -> dict[str, Any]:
    """What stats.json says of a distribution: {count}, and where there are scores mean, std, min, max, quantiles."""
    if not of["count"]:
        return {"count": 0}
    bins, counts = _counts(of)
    middles, reached = _scores(bins, 1 << 15, of), np.cumsum(counts) / of["count"]
    quantiles = {f"{100 * q:g}%": float(middles[np.searchsorted(reached, q)]) for q in QUANTILES}
    return {
        "count": of["count"],
        "mean": of["sum"] / of["count"],
        "std": _std(of),
        "min": of["min"],
        "max": of["max"],
        "quantiles": quantiles,
    }


def warnings(of: dict[str, Any]) -> list[str]:
    """What is suspicious: scores that are all alike, or that lie at the ends of their range."""
    if of["count"] < 2:
        return []
    if _std(of) < COLLAPSED:
        return [
            f"the teacher's scores are collapsed: the standard deviation of {of['count']} is {_std(of):.1e}, so they "
            "tell no passage from another; look at score.model, its kind and its instructions"
        ]
    bins, counts = _counts(of)
    margin = END * (of["max"] - of["min"])
    least, greatest = _scores(bins, 0, of), _scores(bins, (1 << 16) - 1, of)
    share = counts[(greatest <= of["min"] + margin) | (least >= of["max"] - margin)].sum() / of["count"]
    if of["count"] < ENOUGH or share < SATURATED:
        return []
    return [
        f"the teacher's scores are saturated: {share:.0%} lie within {END:.1%} of the least or the greatest, "
        f"{of['min']:.4g} and {of['max']:.4g}, and differ little; a teacher without a sigmoid at its end teaches more"
    ]


def _std(of: dict[str, Any]) -> float:
    mean = of["sum"] / of["count"]
    return math.sqrt(max(of["squares"] / of["count"] - mean**2, 0.0))


def _bins(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Number of each score's bin; greater scores have greater numbers."""
    bits = values.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(16)


def _counts(of: dict[str, Any]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Numbers of the bins, ascending, and how many scores are in each."""
    bins = np.array(sorted(map(int, of["bins"])), np.uint32)
    return bins, np.array([of["bins"][str(number)] for number in bins], np.int64)


def _scores(bins: NDArray[np.uint32], place: int, of: dict[str, Any]) -> NDArray[np.float32]:
    """A score of each bin, at a place from 0 (its least) to 65535 (its greatest), within min and max of all."""
    ordered = (bins << np.uint32(16)) | np.uint32(place)
    bits = np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered)
    return np.clip(bits.astype(np.uint32).view(np.float32), of["min"], of["max"])
