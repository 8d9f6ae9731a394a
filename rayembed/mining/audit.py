"""What mining chose, for people to look at: histograms with fixed bins, which add up over units, and some examples."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rayembed.mining.filters import Candidate

SCORE_BINS = 40  # of -1 to 1
EXAMPLES = 20
TEXT_LIMIT = 300  # characters kept of an example's texts
Histograms = dict[str, list[int]]


def example_rows(num_rows: int, seed: int) -> frozenset[int]:
    """Numbers of EXAMPLES rows (all, if there are no more), however rows are cut into units."""
    rng = np.random.default_rng(seed)
    return frozenset(rng.choice(num_rows, min(EXAMPLES, num_rows), replace=False).tolist())


def example(query: str, positives: Sequence[str], negatives: Iterable[Candidate]) -> dict[str, Any]:
    """A row as JSON, texts cut; rank and score are None for a negative that filled up."""
    return {
        "query": _cut(query),
        "positives": [_cut(text) for text in positives],
        "negatives": [
            {
                "id": c.id,
                "text": _cut(c.text),
                "rank": c.rank if c.rank >= 0 else None,
                "score": c.score if c.rank >= 0 else None,
            }
            for c in negatives
        ],
    }


def histograms(
    negatives: Iterable[Candidate], positive_scores: Iterable[float], *, first_rank: int, last_rank: int
) -> Histograms:
    """How many negatives lie in each part of the window, and how negatives and positives score.

    Args:
        negatives: chosen ones; those that filled up have neither rank nor score and are not counted.
        positive_scores: of positives whose score is known.
        first_rank: of the window.
        last_rank: of the window, not in it.

    Returns:
        ranks [rank_bins], negative_scores and positive_scores [SCORE_BINS]; scores beyond -1 and 1 are in the end bins.
    """
    ranked = [c for c in negatives if c.rank >= 0]
    bins = rank_bins(first_rank, last_rank)
    ranks = np.array([c.rank - first_rank for c in ranked], np.int64)
    return {
        "ranks": np.bincount(ranks * bins // max(last_rank - first_rank, 1), minlength=bins).tolist(),
        "negative_scores": _scores([c.score for c in ranked]),
        "positive_scores": _scores(positive_scores),
    }


def rank_bins(first_rank: int, last_rank: int) -> int:
    """Bins of a window of ranks: one a rank where that can be drawn, so that bins hold equally many, else 20."""
    window = last_rank - first_rank
    return window if window <= 60 else 20


def summed(units: Sequence[Histograms]) -> Histograms:
    """The histograms of all units as one."""
    return {name: np.sum([unit[name] for unit in units], axis=0).tolist() for name in units[0]}


def _scores(scores: Iterable[float]) -> list[int]:
    counts, _ = np.histogram(np.clip(list(scores), -1, 1), bins=SCORE_BINS, range=(-1, 1))
    return [int(count) for count in counts]


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else f"{text[: TEXT_LIMIT - 1]}…"
