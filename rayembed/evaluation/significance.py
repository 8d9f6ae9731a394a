"""Is the tuned model better, or was it luck? A paired test over queries, and an interval of the difference."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
SAME = 1e-12  # closer values differ by the order of a sum, not by a ranking
ELEMENTS_PER_BATCH = 2_000_000  # float64 values that a batch of resamples holds: 16 MB, whatever the number of queries


def compare(
    metric: str, base: dict[str, float], tuned: dict[str, float], *, num_permutations: int, seed: int
) -> dict[str, Any]:
    """Compare two models on the same queries.

    The test flips the sign of each query's difference at random (two-sided); with 2^queries flips or fewer than
    `num_permutations` it takes every one. The interval is the percentile bootstrap of the mean difference: BCa would
    need a jackknife, quadratic in the queries, and corrects a skew that means over hundreds of queries do not have.

    Args:
        metric: name that the result carries, such as `ndcg@10`.
        base: value by query id.
        tuned: value by the same query ids.
        num_permutations: sign flips, and resamples of the bootstrap.
        seed: of both.

    Returns:
        JSON-ready: metric, base and tuned (means), difference (tuned minus base), p_value in (0, 1], ci95 [low, high],
        wins, ties and losses of the tuned model, num_queries.

    Raises:
        ValueError: the two have different queries, or none.

    Source: randomisation test for retrieval, Smucker et al., CIKM 2007.
    """
    if base.keys() != tuned.keys() or not base:
        raise ValueError(
            f"{metric}: base has {len(base)} queries, tuned {len(tuned)}, {len(base.keys() & tuned.keys())} in common; "
            "a paired test needs the same queries, at least one"
        )
    ids = sorted(base)
    before = np.array([base[query_id] for query_id in ids], dtype=np.float64)
    after = np.array([tuned[query_id] for query_id in ids], dtype=np.float64)
    differences = after - before
    differences[np.abs(differences) < SAME] = 0.0
    low, high = bootstrap_interval(differences, num_resamples=num_permutations, seed=seed)
    return {
        "metric": metric,
        "base": float(before.mean()),
        "tuned": float(after.mean()),
        "difference": float(differences.mean()),
        "p_value": randomisation_p_value(differences, num_permutations=num_permutations, seed=seed),
        "ci95": [low, high],
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "num_queries": len(ids),
    }


def randomisation_p_value(differences: NDArray[np.float64], *, num_permutations: int, seed: int) -> float:
    """Two-sided p-value of the mean of `differences` [queries] under random signs; 1 if all are 0, or for one query."""
    if differences.size == 1:  # scipy refuses it; its two flips are equally far from 0
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_permutations,
        batch=_batch(differences),
        alternative="two-sided",
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def bootstrap_interval(differences: NDArray[np.float64], *, num_resamples: int, seed: int) -> tuple[float, float]:
    """95% interval of the mean of `differences` [queries]; of no width if all are equal."""
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        vectorized=True,
        n_resamples=num_resamples,
        batch=_batch(differences),
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _batch(differences: NDArray[np.float64]) -> int:
    return max(1, ELEMENTS_PER_BATCH // differences.size)
