"""Plots as SVG that stands inside the page: its colours are the page's, so that one image serves light and dark.

Matplotlib knows only fixed colours. Each role is drawn in a colour that nothing else uses, and that colour is replaced
by the page's in the SVG text.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

INK, POSITIVE, NEGATIVE = "#010203", "#010204", "#010205"
SIDES: dict[str, tuple[str, Any]] = {"negatives": (NEGATIVE, (0, (4, 2))), "positives": (POSITIVE, "solid")}
PAGE_COLOURS = {INK: "currentColor", POSITIVE: "var(--blue)", NEGATIVE: "var(--orange)"}
SIZE = (4.4, 2.6)  # inches; small, so that letters stay legible when a phone scales the plot to its width
STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, and in the page's font
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
POINTS = 200  # longer runs are averaged over spans of steps: the trend shows, and the page stays small


def curve(name: str, steps: Sequence[int], values: Sequence[float], *, label: str) -> Markup:
    """One quantity over the steps of training.

    Args:
        name: unique on the page; begins the ids inside the SVG.
        steps: [S] x values, ascending.
        values: [S] finite y values. Runs of more than POINTS steps are drawn as means of spans, in a band from the
            span's smallest to its largest value.
        label: what the image shows, for readers who do not see it.
    """
    x, mean, low, high = spans(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64))
    with page_style(name):
        figure, axes = empty_axes()
        if len(x) < len(steps):
            axes.fill_between(x, low, high, color=POSITIVE, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=POSITIVE, linewidth=1.5, marker="o" if len(x) == 1 else "")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.01)
        return as_svg(figure, name, label)


def spans(
    x: NDArray[np.float64], y: NDArray[np.float64], limit: int = POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean x, and mean, smallest and largest y of at most `limit` spans of neighbours of equal size (within one)."""
    starts = np.linspace(0, len(x), num=min(limit, len(x)), endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(x)))
    return (
        np.add.reduceat(x, starts) / sizes,
        np.add.reduceat(y, starts) / sizes,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )


def similarities(name: str, summary: dict[str, Any], *, x_limits: tuple[float, float], label: str) -> Markup:
    """Histograms of the similarities of positives and negatives, as density, with their means.

    Args:
        name: unique on the page; begins the ids inside the SVG.
        summary: as evaluation writes it: edges, and positives and negatives with mean and histogram.
        x_limits: the same for the models that are compared.
        label: what the image shows, for readers who do not see it.
    """
    edges = np.asarray(summary["edges"])
    with page_style(name):
        figure, axes = empty_axes()
        for side, (colour, line) in SIDES.items():
            # density, because the bins of the two models differ in width
            density = np.asarray(summary[side]["histogram"]) / np.diff(edges)
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.3, linewidth=0)
            axes.stairs(density, edges, color=colour, linewidth=1.5, linestyle=line, label=side)
            axes.axvline(summary[side]["mean"], color=colour, linewidth=1, linestyle=line)
        axes.set_xlim(*x_limits)
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        axes.set_ylabel("density of pairs")
        axes.set_xlabel("similarity (upright lines: means)")
        figure.legend(loc="outside upper right", ncols=2, reverse=True)
        return as_svg(figure, name, label)


def histogram(
    name: str,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    *,
    x_label: str,
    label: str,
    mark: float | None = None,
) -> Markup:
    """Shares of negatives, or of negatives and positives, in equal bins.

    Args:
        name: unique on the page; begins the ids inside the SVG.
        edges: [B + 1] of the bins, ascending; drawn from the first to the last.
        counts: [B] of `negatives` and, where there are two, `positives`; each is drawn as shares of its sum.
        x_label: of the axis.
        label: what the image shows, for readers who do not see it.
        mark: x value of an upright line; the axis is widened to show it. None: no line.
    """
    with page_style(name):
        figure, axes = empty_axes()
        for side, own in counts.items():
            colour, line = SIDES[side]
            shares = np.asarray(own) / max(sum(own), 1)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3, linewidth=0)
            axes.stairs(shares, edges, color=colour, linewidth=1.5, linestyle=line, label=side)
        axes.set_xlim(edges[0], edges[-1])
        if mark is not None:
            axes.set_xlim(min(edges[0], mark), max(edges[-1], mark))
            axes.axvline(mark, color=INK, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share")
        axes.set_xlabel(x_label)
        if len(counts) > 1:
            figure.legend(loc="outside upper right", ncols=2, reverse=True)
        return as_svg(figure, name, label)


def differences(name: str, values: Sequence[float], *, label: str) -> Markup:
    """Differences of all queries, from won most to lost most; of more than POINTS queries, means of neighbours.

    Args:
        name: unique on the page; begins the ids inside the SVG.
        values: tuned minus base, a query; in any order.
        label: what the image shows, for readers who do not see it.
    """
    places = np.arange(len(values), dtype=np.float64)
    _, ordered, _, _ = spans(places, np.sort(np.asarray(values, dtype=np.float64))[::-1])
    edges = np.linspace(0, len(values), num=len(ordered) + 1)
    with page_style(name):
        figure, axes = empty_axes()
        axes.stairs(np.maximum(ordered, 0), edges, fill=True, color=POSITIVE, linewidth=0)
        axes.stairs(np.minimum(ordered, 0), edges, fill=True, color=NEGATIVE, linewidth=0)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("queries, from won most to lost most")
        axes.set_ylabel("tuned minus base")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.01)
        return as_svg(figure, name, label)


def page_style(name: str) -> AbstractContextManager[None]:
    """How a plot with a name of its own on the page is drawn."""
    settings: Any = STYLE | {"svg.hashsalt": name}  # the salt makes ids of clip paths the same at every build
    return matplotlib.rc_context(settings)


def empty_axes() -> tuple[Figure, Axes]:
    """A figure of the page's size with one plot."""
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.add_subplot()


def as_svg(figure: Figure, name: str, label: str) -> Markup:
    """What stands inside the page.

    Args:
        figure: drawn within `page_style`.
        name: unique on the page; begins the ids inside the SVG.
        label: what the image shows, for readers who do not see it.
    """
    buffer = io.StringIO()
    metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # same data, same bytes
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # the XML and document type lines have no place inside HTML
    text = re.sub(r'\s(xmlns(:xlink)?|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = re.sub(
        r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text
    )  # ids are the page's: those of two plots must differ
    for colour, page_colour in PAGE_COLOURS.items():
        text = text.replace(colour, page_colour)
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(label), 1))
