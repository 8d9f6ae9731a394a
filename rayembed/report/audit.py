"""audit.html: what mining chose, to look at before training on it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayembed.report import plots, wording
from rayembed.report.rendering import counts_tables, render


def audit_page(
    title: str,
    stats: dict[str, Any],
    histograms: dict[str, list[int]],
    examples: Sequence[dict[str, Any]],
    *,
    window: tuple[int, int],
) -> str:
    """One self-contained page; it loads nothing and runs no script.

    Args:
        title: of the page.
        stats: counts; `filled_up` is one of them.
        histograms: ranks over the window, negative_scores and positive_scores over -1 to 1; any number of equal bins.
        examples: query, positives, and negatives with id, text, rank and score (None where they filled up).
        window: first rank and the one after the last.
    """
    negatives, positives = histograms["negative_scores"], histograms["positive_scores"]
    return render(
        "audit.html.j2",
        {
            "title": title,
            "counts": counts_tables(stats),
            "num_ranked": f"{sum(negatives):,}",
            "num_filled_up": f"{stats['filled_up']:,}",
            "num_positives": f"{sum(positives):,}",
            "ranks": plots.histogram(
                "ranks",
                _edges(window, histograms["ranks"]),
                {"negatives": histograms["ranks"]},
                x_label="rank",
                label=f"Ranks of the negatives between {window[0]} and {window[1]}",
            ),
            "scores": plots.histogram(
                "scores",
                _edges((-1, 1), negatives),
                {"negatives": negatives, "positives": positives},
                x_label="score",
                label="Scores of the negatives and of the positives",
            ),
            "examples": [_example(row) for row in examples],
        },
    )


def _edges(span: tuple[float, float], bins: Sequence[int]) -> list[float]:
    return [float(edge) for edge in np.linspace(*span, len(bins) + 1)]


def _example(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "negatives": [{**negative, "place": _place(negative)} for negative in row["negatives"]]}


def _place(negative: dict[str, Any]) -> str:
    if negative["rank"] is None:
        return "filled up"
    return f"rank {negative['rank']}, score {wording.decimal(negative['score'], 3)}"
