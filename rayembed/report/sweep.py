"""A sweep for the page: its trials as a table, and which values did well, from tune/sweep.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rayembed.report import reading, wording
from rayembed.report.plots import INK, NEGATIVE, POSITIVE, SIZE, as_svg, empty_axes, page_style

FILE = "tune/sweep.json"
LOG_FROM = 8  # largest value over smallest, from which an axis is logarithmic
INCHES_A_KEY = 1.5
BEST, BASELINE, OTHER = (
    {"color": POSITIVE, "linewidth": 2, "zorder": 3},
    {"color": NEGATIVE, "linewidth": 1.5, "linestyle": (0, (4, 2)), "zorder": 2},
    {"color": INK, "linewidth": 1, "alpha": 0.3, "zorder": 1},
)
READING = "Solid: the best trial. Dashed: the experiment as it is."


@dataclass(frozen=True)
class Scale:
    """Values of a key as places on an axis."""

    places: list[float]
    """Of each trial; not a number where the key is not set."""

    ticks: list[tuple[float, str]]
    """Of an axis of words; empty for numbers."""

    logarithmic: bool


@dataclass(frozen=True)
class SweepSection:
    """Facts as (name, value) pairs, the table's columns and rows, and figures as (title, caption, SVG)."""

    facts: list[tuple[str, str]]
    columns: list[str]
    rows: list[list[str]]
    figures: list[tuple[str, str, Markup]]


def sweep_section(run_folder: Path) -> SweepSection | None:
    """What a sweep found so far; None where there is none.

    Raises:
        ValueError: the file is broken; names it.
    """
    found = reading.read_json(run_folder, FILE)
    if found is None or not found["trials"]:
        return None
    metric, keys = found["metric"], found["keys"]
    trials = sorted(found["trials"], key=lambda own: (-(_finite(own[metric]) or -math.inf), own["number"]))
    measured = [own for own in trials if _finite(own[metric]) is not None]
    figures = [] if not measured else [_parallel(measured, keys, metric), *_against(measured, keys, metric)]
    curves = [own for own in measured if len(own["evaluations"]) > 1]
    figures += [_curves(curves, metric)] if curves else []
    return SweepSection(
        facts=_facts(found, measured),
        columns=["trial", *keys, wording.metric_label(metric), "at step", "steps", "time", "what became of it"],
        rows=[_cells(own, keys, metric) for own in trials],
        figures=figures,
    )


def scale_of(values: Sequence[Any]) -> Scale:
    """Numbers stay numbers, anything else becomes words in the order of their first appearance."""
    set_ones = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in set_ones) and set_ones:
        logarithmic = min(set_ones) > 0 and max(set_ones) / min(set_ones) >= LOG_FROM
        return Scale([math.nan if value is None else float(value) for value in values], [], logarithmic)
    words = list(dict.fromkeys(_shown(value) for value in values))
    places = [float(words.index(_shown(value))) for value in values]
    return Scale(places, [(float(place), wording.shorten(word, 20)) for place, word in enumerate(words)], False)


def _facts(found: dict[str, Any], measured: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    metric, trials = found["metric"], found["trials"]
    counts = {status: sum(own["status"] == status for own in trials) for status in ("done", "stopped early", "failed")}
    as_it_is = next((own[metric] for own in measured if own["baseline"]), None)
    best = measured[0] if measured else None
    facts = [
        ("trials", ", ".join(f"{count} {status}" for status, count in counts.items() if count)),
        (f"{wording.metric_label(metric)} of the model before training", wording.decimal(found["base"])),
        ("with the experiment as it is", wording.decimal(as_it_is)),
    ]
    if best is not None:
        gain = None if as_it_is is None else best[metric] - as_it_is
        facts.append(("best", f"{wording.decimal(best[metric])} ({wording.signed(gain)}), trial {best['number']}"))
    return facts


def _cells(trial: dict[str, Any], keys: Sequence[str], metric: str) -> list[str]:
    became = [trial["status"], *(["the experiment as it is"] if trial["baseline"] else [])]
    became += [wording.shorten(trial["error"])] if trial["error"] else []
    return [
        str(trial["number"]),
        *(_shown(trial[key]) for key in keys),
        wording.decimal(_finite(trial[metric])),
        wording.quantity(trial["step"]),
        wording.quantity(trial["steps"]),
        wording.duration(trial["seconds"]),
        ": ".join(became),
    ]


def _parallel(trials: Sequence[dict[str, Any]], keys: Sequence[str], metric: str) -> tuple[str, str, Markup]:
    """Every trial a line through its values, the figure last."""
    columns = [*keys, metric]
    scales = [scale_of([own[column] for own in trials]) for column in columns]
    heights = np.array([_heights(scale) for scale in scales])
    label = f"{len(trials)} trials as lines through {', '.join(columns)}"
    with page_style("sweep-parallel"):
        figure = Figure(figsize=(max(SIZE[0], INCHES_A_KEY * len(columns)), SIZE[1]), layout="constrained")
        axes = figure.add_subplot()
        for place, own in enumerate(trials):
            axes.plot(heights[:, place], marker=".", **_look(own, best=place == 0))
        axes.set_xticks(range(len(columns)), [_with_ends(column, scales[i]) for i, column in enumerate(columns)])
        axes.set_yticks([])
        axes.grid(axis="x", alpha=0.6)
        axes.margins(x=0.05)
        image = as_svg(figure, "sweep-parallel", label)
    return "Trials through their values", f"{READING} Below each axis its ends, the lowest first.", image


def _against(trials: Sequence[dict[str, Any]], keys: Sequence[str], metric: str) -> list[tuple[str, str, Markup]]:
    """The figure against each key."""
    found = []
    for number, key in enumerate(keys):
        scale = scale_of([own[key] for own in trials])
        name = f"sweep-key-{number}"
        with page_style(name):
            figure, axes = empty_axes()
            for place, own in enumerate(trials):
                look = {**_look(own, best=place == 0), "linestyle": "none"}
                axes.plot(scale.places[place], own[metric], marker="o", **look)
            _label_axis(axes, scale)
            axes.set_ylabel(wording.metric_label(metric))
            image = as_svg(figure, name, f"{metric} of {len(trials)} trials against {key}")
        found.append((key, "A point a trial.", image))
    return found


def _curves(trials: Sequence[dict[str, Any]], metric: str) -> tuple[str, str, Markup]:
    """The evaluations of every trial over its steps."""
    with page_style("sweep-curves"):
        figure, axes = empty_axes()
        for place, own in enumerate(trials):
            steps, figures = zip(*own["evaluations"], strict=True)
            axes.plot(steps, figures, **_look(own, best=place == 0))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(wording.metric_label(metric))
        image = as_svg(figure, "sweep-curves", f"{metric} over the steps of {len(trials)} trials")
    return "Learning curves", f"On the dev split, from the model before training at step 0. {READING}", image


def _look(trial: dict[str, Any], *, best: bool) -> dict[str, Any]:
    return BEST if best else BASELINE if trial["baseline"] else OTHER


def _heights(scale: Scale) -> list[float]:
    """Places from 0 to 1."""
    places = np.log(scale.places) if scale.logarithmic else np.array(scale.places)
    low, high = np.nanmin(places), np.nanmax(places)
    spread: list[float] = ((places - low) / (high - low) if high > low else places - low + 0.5).tolist()
    return spread


def _with_ends(column: str, scale: Scale) -> str:
    """What stands below an axis of the parallel plot."""
    known = [place for place in scale.places if not math.isnan(place)]
    ends = [min(known), max(known)]
    texts = [dict(scale.ticks)[end] if scale.ticks else f"{end:.4g}" for end in ends]
    return f"{column.rpartition('.')[2]}\n{texts[0]} … {texts[1]}"


def _label_axis(axes: Axes, scale: Scale) -> None:
    if scale.ticks:
        axes.set_xticks([place for place, _ in scale.ticks], [text for _, text in scale.ticks])
    elif scale.logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else wording.quantity(value)
