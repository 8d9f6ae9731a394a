"""Training in figures: curves and throughput from train/metrics.jsonl, the dev metric from train/evaluations.jsonl."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rayembed.report import plots, wording

# Column of metrics.jsonl -> title and what it is.
PANELS = {
    "loss": ("Loss", "of each step"),
    "learning_rate": ("Learning rate", "of the optimiser's step"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "queries_per_second": ("Queries a second", "all workers together"),
    "tokens_per_second": ("Tokens a second", "all workers together"),
    "padding_share": ("Padding", "share of the tokens computed that are padding"),
}
ENDS = 10  # steps averaged for the loss at the start and at the end


@dataclass(frozen=True)
class Panel:
    """One curve: its title, a line below, and the SVG."""

    title: str
    caption: str
    image: Markup


@dataclass(frozen=True)
class TrainingSection:
    """Facts as (name, value) pairs, the curves of the columns that have values, and how to read them ("": as is)."""

    facts: list[tuple[str, str]]
    note: str
    panels: list[Panel]


def training_section(
    rows: Iterable[dict[str, Any]], evaluations: Iterable[dict[str, Any]] = ()
) -> TrainingSection | None:
    """Facts and curves; None if there are no rows. A step that is there twice counts once, as it ran last.

    Args:
        rows: of the steps.
        evaluations: on the dev split; those that are of the same texts and metric as the last one are shown.
    """
    total, by_step = 0, {}
    for row in rows:
        total += 1
        by_step[row["step"]] = row
    if not by_step:
        return None
    ordered = [by_step[step] for step in sorted(by_step)]
    panels = [panel for column in PANELS if (panel := _panel(column, ordered)) is not None]
    judged = _alike([*evaluations])
    if judged:
        panels.insert(1, _dev_panel(judged))
    span = len(ordered) / plots.POINTS
    note = f"Lines are means over about {span:.3g} steps, bands their range." if span > 1 else ""
    facts = [*_facts(ordered, repeated=total - len(ordered)), *_dev_facts(judged)]
    return TrainingSection(facts=facts, note=note, panels=panels)


def _alike(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of steps, those that can be compared with the last one."""
    found = {
        line["step"]: line
        for line in evaluations
        if (line["metric"], line["of"]) == (evaluations[-1]["metric"], evaluations[-1]["of"])
    }
    return [found[step] for step in sorted(found)]


def _dev_panel(lines: list[dict[str, Any]]) -> Panel:
    metric = lines[-1]["metric"]
    title, values = wording.metric_label(metric), [line["eval"][metric] for line in lines]
    label = f"{title} over {len(lines):,} evaluations, from {values[0]:.4g} to {values[-1]:.4g}"
    image = plots.curve("train-dev", [line["step"] for line in lines], values, label=label)
    return Panel(title=f"{title} on the dev split", caption=lines[-1]["of"], image=image)


def _dev_facts(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not lines:
        return []
    last, metric = lines[-1], lines[-1]["metric"]
    best = max(lines, key=lambda line: float(line["eval"][metric]))  # of equal ones the first
    figures = " → ".join(f"{line['eval'][metric]:.4f} (step {line['step']:,})" for line in (lines[0], best, last))
    facts = [(f"dev {wording.metric_label(metric)}, first, best and last", figures), ("dev split", last["of"])]
    if last.get("stopped_early"):
        facts.append(("stopped early", f"after step {last['step']:,}: evaluations were no better"))
    if last.get("model_step", last["step"]) != last["step"]:
        step = last["model_step"]
        facts.append(("the model is that of", f"step {step:,}" if step else "no step: the base model was the best"))
    return facts


def _panel(column: str, rows: list[dict[str, Any]]) -> Panel | None:
    title, caption = PANELS[column]
    present = [row for row in rows if row.get(column) is not None]
    finite = [row for row in present if math.isfinite(row[column])]
    if not finite:
        return None
    if len(finite) < len(present):
        caption += f"; {len(present) - len(finite):,} steps that are not finite are left out"
    image = plots.curve(
        f"train-{column.replace('_', '-')}",
        [row["step"] for row in finite],
        [row[column] for row in finite],
        label=f"{title} over {len(finite):,} steps, from {finite[0][column]:.4g} to {finite[-1][column]:.4g}",
    )
    return Panel(title=title, caption=caption, image=image)


def _facts(rows: list[dict[str, Any]], *, repeated: int) -> list[tuple[str, str]]:
    facts = [("steps", f"{len(rows):,}")]
    if epoch := _column(rows, "epoch"):
        facts.append(("last epoch", f"{epoch[-1]:.4g}"))
    if losses := _column(rows, "loss"):
        ends = statistics.fmean(losses[:ENDS]), statistics.fmean(losses[-ENDS:])
        facts.append((f"loss, mean of first and last {min(ENDS, len(losses))} steps", f"{ends[0]:.4f} → {ends[1]:.4f}"))
    if seconds := _column(rows, "seconds"):
        facts.append(("time in steps", wording.duration(sum(seconds))))
    if queries := _column(rows, "queries_per_second"):
        facts.append(("queries a second, median", f"{statistics.median(queries):,.1f}"))
    if tokens := _column(rows, "tokens_per_second"):
        facts.append(("tokens a second, median", f"{statistics.median(tokens):,.0f}"))
    if padding := _column(rows, "padding_share"):
        facts.append(("padding, mean", f"{100 * statistics.fmean(padding):.1f} %"))
    if negatives := _column(rows, "negatives_per_query"):
        facts.append(("negatives a query, median", f"{statistics.median(negatives):,.0f}"))
    alarms = Counter(name for row in rows for name in row.get("alarms", []))
    facts += [(f"steps with alarm {name.replace('_', ' ')}", f"{count:,}") for name, count in sorted(alarms.items())]
    if repeated:
        facts.append(("steps run again after a restart", f"{repeated:,}"))
    return facts


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]
