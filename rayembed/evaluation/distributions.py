"""How far a model keeps similarities of positives and of negatives apart."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def similarity_summary(
    positives: NDArray[np.floating[Any]], negatives: NDArray[np.floating[Any]], bins: int = 60
) -> dict[str, Any]:
    """Two histograms over shared edges, and three numbers for how far they are apart.

    Args:
        positives: [P] similarities of queries with their positives.
        negatives: [N] similarities of queries with negatives; N need not be P.
        bins: bins from the smallest to the largest of all similarities, at least 1.

    Returns:
        JSON-ready: edges [bins + 1]; positives and negatives, each {count, mean, std, histogram [bins] of shares that
        sum to 1}; overlap in [0, 1], the area that the histograms share; gap, the difference of the means; auc in
        [0, 1], the chance that a positive is above a negative (equal ones count half).

    Raises:
        ValueError: one of the two is empty or holds a value that is not finite.
    """
    sides = {}
    for name, values in (("positives", positives), ("negatives", negatives)):
        side = np.asarray(values, dtype=np.float64).ravel()
        if side.size == 0 or not np.isfinite(side).all():
            bad = int((~np.isfinite(side)).sum())
            raise ValueError(f"{name} holds {side.size} similarities, {bad} not finite; needs at least 1, all finite")
        sides[name] = side
    edges = np.histogram_bin_edges(np.concatenate(list(sides.values())), bins=bins)
    shares = {name: np.histogram(side, bins=edges)[0] / side.size for name, side in sides.items()}
    return {
        "edges": edges.tolist(),
        **{name: _describe(side, shares[name]) for name, side in sides.items()},
        "overlap": float(np.minimum(shares["positives"], shares["negatives"]).sum()),
        "gap": float(sides["positives"].mean() - sides["negatives"].mean()),
        "auc": _auc(sides["positives"], sides["negatives"]),
    }


def _describe(values: NDArray[np.float64], shares: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "count": int(values.size),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "histogram": shares.tolist(),
    }


def _auc(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """Mann-Whitney's U over the number of pairs: ranks in place of P x N comparisons."""
    ranks = stats.rankdata(np.concatenate([positives, negatives]))
    wins = ranks[: positives.size].sum() - positives.size * (positives.size + 1) / 2
    return float(wins / (positives.size * negatives.size))
