"""Base against tuned, for the page: the headline, the table of metrics, similarities, queries won and lost."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from rayembed.config.wording import counted
from rayembed.report import plots, wording

ALPHA = 0.05  # p-values below are called significant
SHOWN = 10  # queries won most, and lost most
SUMMARY_ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "AUC": ("how often a positive is above a negative; 1 is perfect", lambda summary: summary["auc"]),
    "overlap": ("share of the two histograms that coincides; 0 is perfect", lambda summary: summary["overlap"]),
    "gap": ("mean of the positives minus mean of the negatives", lambda summary: summary["gap"]),
    "positives, mean": ("", lambda summary: summary["positives"]["mean"]),
    "positives, standard deviation": ("", lambda summary: summary["positives"]["std"]),
    "negatives, mean": ("", lambda summary: summary["negatives"]["mean"]),
    "negatives, standard deviation": ("", lambda summary: summary["negatives"]["std"]),
}


@dataclass(frozen=True)
class Headline:
    """The result in words; `verdict` is better, worse, unclear or unknown."""

    verdict: str
    badge: str
    sentence: str


@dataclass(frozen=True)
class MetricRow:
    """One metric as text, ready for the table."""

    label: str
    base: str
    tuned: str
    difference: str
    relative: str
    tested: bool


@dataclass(frozen=True)
class TaskRow:
    """One task beside retrieval as text, ready for the table."""

    name: str
    kind: str
    metric: str
    base: str
    tuned: str
    difference: str
    interval: str
    texts: str


@dataclass(frozen=True)
class Example:
    """A query won or lost; texts are cut, the tops are None where a model ranked nothing."""

    query_id: str
    query: str
    base: str
    tuned: str
    difference: str
    positive: str
    more_positives: int
    tops: list[tuple[str, dict[str, Any] | None]]


@dataclass(frozen=True)
class Examples:
    """The queries won most and lost most, and the plot of all differences."""

    won: list[Example]
    lost: list[Example]
    image: Markup


def headline(metrics: dict[str, Any] | None) -> Headline:
    """What went from what to what, and whether that may be chance."""
    if metrics is None:
        return Headline("unknown", "not evaluated", "This run has not been evaluated yet.")
    test = metrics.get("significance")
    if test is None and metrics.get("tasks") and "base" not in metrics:
        return Headline("unknown", "tasks alone", _task_sentence(metrics))
    if test is None:
        return Headline("unknown", "not tested", "Base and tuned model were not compared by a paired test.")
    difference, significant = test["difference"], test["p_value"] < ALPHA
    verb = "rose" if difference > 0 else "fell" if difference < 0 else "stayed"
    low, high = test["ci95"]
    sentence = (
        f"{wording.metric_label(test['metric'])} {verb} from {wording.decimal(test['base'])} to "
        f"{wording.decimal(test['tuned'])} ({wording.signed(difference)}; 95 % interval {wording.signed(low)} to "
        f"{wording.signed(high)}; p = {test['p_value']:.2g}): the tuned model won {test['wins']:,} of "
        f"{counted(test['num_queries'], 'query')}, lost {test['losses']:,} and tied {test['ties']:,}."
    )
    if not significant:
        return Headline("unclear", "no significant difference", f"{sentence} A difference like this may be chance.")
    verdict = "better" if difference > 0 else "worse"
    return Headline(verdict, f"significantly {verdict}", sentence)


def _task_sentence(metrics: dict[str, Any]) -> str:
    told = "; ".join(
        f"{row.name}: {row.metric} {row.base}" + (f" → {row.tuned}" if row.tuned != wording.ABSENT else "")
        for row in task_rows(metrics)
    )
    return f"{told}. No retrieval was judged."


def task_rows(metrics: dict[str, Any]) -> list[TaskRow]:
    """A row a task of metrics.json, in its order."""
    rows = []
    for name, task in metrics.get("tasks", {}).items():
        base, tuned, interval = task["base"], task.get("tuned"), task.get("ci95")
        rows.append(
            TaskRow(
                name=name,
                kind=task["kind"],
                metric=wording.metric_label(task["metric"]),
                base=wording.decimal(base),
                tuned=wording.decimal(tuned),
                difference=wording.signed(None if tuned is None else tuned - base),
                interval=" to ".join(map(wording.signed, interval)) if interval else wording.ABSENT,
                texts=wording.quantity(task["num_texts"]),
            )
        )
    return rows


def head_rows(metrics: dict[str, Any]) -> list[MetricRow]:
    """A row a head of BGE-M3 that either model has, by the metric that is tested."""
    heads, metric = metrics.get("heads", {}), metrics.get("metric", "")
    base, tuned = (heads.get(model, {}) for model in ("base", "tuned"))
    return [
        replace(
            _metric_row(metric, base.get(head, {}).get(metric), tuned.get(head, {}).get(metric), False),
            label=wording.title_of(head),
        )
        for head in base | tuned
    ]


def metric_rows(metrics: dict[str, Any]) -> list[MetricRow]:
    """A row a metric that either model has, by kind of metric and cut-off."""
    base, tuned = metrics.get("base") or {}, metrics.get("tuned") or {}
    tested = (metrics.get("significance") or {}).get("metric")
    return [_metric_row(name, base.get(name), tuned.get(name), name == tested) for name in _ordered(base | tuned)]


def _metric_row(name: str, base: float | None, tuned: float | None, tested: bool) -> MetricRow:
    both = base is not None and tuned is not None
    difference = tuned - base if base is not None and tuned is not None else None
    relative = f"{wording.signed(100 * difference / base, 1)} %" if difference is not None and base else wording.ABSENT
    return MetricRow(
        label=wording.metric_label(name),
        base=wording.decimal(base),
        tuned=wording.decimal(tuned),
        difference=wording.signed(difference),
        relative=relative if both else wording.ABSENT,
        tested=tested,
    )


def _ordered(names: Iterable[str]) -> list[str]:
    kinds = list(wording.METRIC_LABELS)

    def place(name: str) -> tuple[int, int, str]:
        kind, _, k = name.partition("@")
        return (kinds.index(kind) if kind in kinds else len(kinds), int(k) if k.isdecimal() else 0, name)

    return sorted(names, key=place)


def test_facts(test: dict[str, Any]) -> list[tuple[str, str]]:
    """The paired test as (name, value) pairs."""
    low, high = test["ci95"]
    return [
        ("difference", wording.signed(test["difference"])),
        ("95 % interval", f"{wording.signed(low)} to {wording.signed(high)}"),
        ("p-value", f"{test['p_value']:.2g}"),
        ("queries won, tied, lost", f"{test['wins']:,}, {test['ties']:,}, {test['losses']:,}"),
    ]


def other_facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What metrics.json holds beside metrics, test and tables: numbers of queries and passages, what was left out."""
    shown = {"base", "tuned", "significance", "tasks", "heads"}
    return [(wording.title_of(key), wording.quantity(value)) for key, value in metrics.items() if key not in shown]


def similarity_figures(similarities: dict[str, Any]) -> list[tuple[str, Markup]]:
    """(model, SVG) for base and tuned, on the same scale of similarities."""
    models = _models(similarities)
    edges = [edge for summary in models.values() for edge in (summary["edges"][0], summary["edges"][-1])]
    return [
        (
            model,
            plots.similarities(
                f"similarities-{model}",
                summary,
                x_limits=(min(edges), max(edges)),
                label=(
                    f"{model}: positives at {summary['positives']['mean']:.2f}, negatives at "
                    f"{summary['negatives']['mean']:.2f} on average, overlap {summary['overlap']:.2f}"
                ),
            ),
        )
        for model, summary in models.items()
    ]


def similarity_rows(similarities: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(name, what it means, a value a model) for each of SUMMARY_ROWS."""
    models = _models(similarities)
    return [
        (name, meaning, [wording.decimal(value(summary), 3) for summary in models.values()])
        for name, (meaning, value) in SUMMARY_ROWS.items()
    ]


def _models(similarities: dict[str, Any]) -> dict[str, Any]:
    return {model: similarities[model] for model in ("base", "tuned") if similarities.get(model)}


def examples(read: Callable[[], Iterable[dict[str, Any]]]) -> Examples | None:
    """The queries whose value rose most and fell most, ties by id; None if there are no rows.

    Args:
        read: gives the rows of per_query.jsonl; called more than once, so that they need not fit in memory.
    """
    values = [_difference(row) for row in read()]
    if not values:
        return None
    won = heapq.nsmallest(SHOWN, read(), key=lambda row: (-_difference(row), str(row["query_id"])))
    lost = heapq.nsmallest(SHOWN, read(), key=lambda row: (_difference(row), str(row["query_id"])))
    return Examples(
        won=[_example(row) for row in won if _difference(row) > 0],
        lost=[_example(row) for row in lost if _difference(row) < 0],
        image=plots.differences(
            "query-differences", values, label=f"Tuned minus base of {len(values):,} queries, sorted"
        ),
    )


def _difference(row: dict[str, Any]) -> float:
    return float(row["tuned"]) - float(row["base"])


def _example(row: dict[str, Any]) -> Example:
    positives = row["positives"] or [wording.ABSENT]
    return Example(
        query_id=str(row["query_id"]),
        query=wording.shorten(row["query"]),
        base=wording.decimal(row["base"], 3),
        tuned=wording.decimal(row["tuned"], 3),
        difference=wording.signed(_difference(row), 3),
        positive=wording.shorten(positives[0]),
        more_positives=len(positives) - 1,
        tops=[(model, _top(row.get(f"{model}_top"))) for model in ("base", "tuned")],
    )


def _top(top: dict[str, Any] | None) -> dict[str, Any] | None:
    if not top:
        return None
    return {
        "id": str(top["id"]),
        "text": wording.shorten(top["text"]),
        "score": wording.decimal(top["score"], 3),
        "relevant": bool(top["relevant"]),
    }
