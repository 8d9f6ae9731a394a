"""audit.html: what mining chose, to look at before training on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from rayembed.report import plots, wording
from rayembed.report.audit_verdict import many, share, verdict
from rayembed.report.rendering import counts_tables, render

MOST_BINS = 50
Histogram = dict[str, int]


@dataclass(frozen=True)
class Figure:
    """A plot with a title and how to read it."""

    title: str
    image: Markup
    caption: str


@dataclass(frozen=True)
class Drop:
    """A filter, what it dropped as text, and that as percent of what the filter that dropped most did."""

    name: str
    count: str
    width: str


def audit_page(
    title: str,
    stats: dict[str, Any],
    audit: dict[str, Any],
    most_used: Sequence[dict[str, Any]],
    *,
    window: tuple[int, int],
) -> str:
    """One self-contained page; it loads nothing and runs no script.

    Args:
        title: of the page.
        stats: what stats.json holds; `passages`, `uses` (`passages` that are a negative, uses of the `most` used one)
            and `dropped` (it knows the filters that dropped nothing, too) are read where they are there.
        audit: counts, dropped, ranks, histograms ({value as text: count}), suspected pairs, queries that are short and
            examples, as the audit of mining sums them.
        most_used: id, text and uses of the passages that are a negative most often, most first.
        window: first rank and the one after the last.
    """
    return render(
        "audit.html.j2",
        {
            "title": title,
            "verdict": verdict(stats, audit, window=window),
            "figures": _figures(audit, window),
            "drops": _drops(stats.get("dropped", audit["dropped"])),
            "suspects": [
                (kind, note, [_suspect(entry) for entry in audit[name]])
                for name, kind, note in (
                    ("suspected_by_teacher", "By the teacher", _note(audit, "teacher", "judged_pairs")),
                    ("suspected_by_score", "By score", _note(audit, "score", "compared_pairs")),
                )
            ],
            "short": [_shortage(entry) for entry in audit["short"]],
            "most_used": [
                {"id": entry["id"], "text": wording.shorten(entry["text"]), "uses": f"{entry['uses']:,}"}
                for entry in most_used
            ],
            "uses": _uses(stats.get("uses")),
            "examples": [_example(row) for row in audit["examples"]],
            "counts": counts_tables(stats),
        },
    )


def _figures(audit: dict[str, Any], window: tuple[int, int]) -> list[Figure]:
    """Those that have something to show."""
    histograms, counts = audit["histograms"], audit["counts"]
    ranked = sum(audit["ranks"])
    figures = []
    scores = {side: histograms[f"{side[:-1]}_scores"] for side in ("negatives", "positives")}
    if any(scores.values()):
        known = [sum(own.values()) for own in scores.values()]
        figures.append(
            Figure(
                "Scores",
                _plot("scores", scores, x_label="score", label="Scores of the negatives and of the positives"),
                f"Of {known[0]:,} negatives and {known[1]:,} positives. The further apart, the easier the negatives.",
            )
        )
    for name, title, whole in (
        ("margins", "Margins", "compared_pairs"),
        ("teacher_margins", "Margins, teacher", "judged_pairs"),
    ):
        if histograms[name]:
            image = _plot(name, {"negatives": histograms[name]}, x_label="positive minus negative", label=title, mark=0)
            caption = (
                f"Of {counts[whole]:,} pairs: the lowest positive of the query minus the negative. "
                "At the upright line and left of it are the suspected false negatives."
            )
            figures.append(Figure(title, image, caption))
    if ranked:
        edges = [float(edge) for edge in np.linspace(*window, len(audit["ranks"]) + 1)]
        label = f"Ranks of the negatives between {window[0]} and {window[1]}"
        image = plots.histogram("ranks", edges, {"negatives": audit["ranks"]}, x_label="rank", label=label)
        caption = f"Of {ranked:,} negatives from the window; {counts['filled_up']:,} that filled up have no rank."
        figures.append(Figure("Ranks", image, caption))
    return figures


def _plot(
    name: str, histograms: Mapping[str, Histogram], *, x_label: str, label: str, mark: float | None = None
) -> Markup:
    edges, counts = binned(histograms)
    return plots.histogram(name, edges, counts, x_label=x_label, label=label, mark=mark)


def binned(histograms: Mapping[str, Histogram]) -> tuple[list[float], dict[str, list[int]]]:
    """Edges that all the histograms share, of at most MOST_BINS + 1 equal bins of a round width, and the counts.

    A bin holds its lower edge. None is narrower than five of the steps that the values have, or some would hold more
    of them than others.
    """
    values = {side: [float(value) for value in own] for side, own in histograms.items()}
    low, high = min(map(min, filter(None, values.values()))), max(map(max, filter(None, values.values())))
    largest = max(abs(low), abs(high))
    step = 0.001 if largest <= 1 else 10.0 ** (math.floor(math.log10(largest)) - 2)
    width = _round_up(max((high - low) / (MOST_BINS - 1), 5 * step))
    first = math.floor(low / width + 1e-9)
    bins = math.floor(high / width + 1e-9) - first + 1
    edges = [(first + i) * width for i in range(bins + 1)]
    counts = {}
    for side, own in histograms.items():
        counts[side] = [0] * bins
        for value, count in own.items():
            counts[side][math.floor(float(value) / width + 1e-9) - first] += count
    return edges, counts


def _round_up(width: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def _drops(dropped: dict[str, int]) -> list[Drop]:
    most = max(dropped.values(), default=0) or 1
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return [Drop(wording.title_of(name), f"{count:,}", f"{100 * count / most:.1f}") for name, count in ordered]


def _note(audit: dict[str, Any], kind: str, whole: str) -> str:
    counts, shown = audit["counts"], len(audit[f"suspected_by_{kind}"])
    total, pairs = counts[f"suspected_by_{kind}"], counts[whole]
    if not pairs:
        return "The teacher judged no pair." if kind == "teacher" else "No pair has scores to compare."
    worst = f", the worst {shown} of them below" if shown < total else ""
    return f"{total:,} of {pairs:,} pairs ({share(total, pairs)}){worst}."


def _suspect(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": entry["query"],
        "query_id": entry["query_id"],
        "excess": f"{0.0 - entry['margin']:.3g}",  # of any size: scores of teachers have none in common
        "positive": _passage(entry["positive"]),
        "others": entry["positives"] - 1,
        "negative": _passage(entry["negative"]),
    }


def _shortage(entry: dict[str, Any]) -> dict[str, str]:
    dropped = sorted(entry["dropped"].items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{wording.title_of(name)} {count:,}" for name, count in dropped if count)
    return {
        "query_id": entry["query_id"],
        "query": entry["query"],
        "missing": f"{entry['wanted'] - entry['negatives']:,}",
        "filled_up": f"{entry['filled_up']:,}",
        "found": f"{entry['negatives'] - entry['filled_up']:,} of {entry['wanted']:,} from the window; "
        f"dropped: {reasons or 'nothing'}",
    }


def _uses(uses: dict[str, Any] | None) -> str:
    """Of the most used passage; "" where it is not counted."""
    if uses is None:
        return ""
    passages = many(uses["passages"], "passage")
    return f"{passages} of the corpus serve as a negative; the most used one serves {many(uses['most'], 'query')}."


def _example(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": row["query"],
        "query_id": row["query_id"],
        "positives": [_passage(positive) for positive in row["positives"]],
        "more_positives": row["num_positives"] - len(row["positives"]),
        "negatives": [_passage(negative) for negative in row["negatives"]],
        "more_negatives": row["num_negatives"] - len(row["negatives"]),
    }


def _passage(passage: dict[str, Any]) -> dict[str, Any]:
    """Id and text, and what is known of the passage in one line."""
    rank = [] if passage.get("rank") is None else [f"rank {passage['rank']:,}"]
    if "rank" in passage and not rank:
        rank = ["filled up"]
    score = [] if passage["score"] is None else [f"score {wording.decimal(passage['score'], 3)}"]
    teacher = [] if passage["teacher"] is None else [f"teacher {wording.decimal(passage['teacher'], 3)}"]
    return {"id": passage["id"] or "", "text": passage["text"], "place": ", ".join(rank + score + teacher)}
