"""SVGs that live inside a page: no request, no fixed ink, ids of their own; and the averaging of long curves."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from markupsafe import Markup

from rayembed.report import plots


def draw(name: str, length: int = 50) -> Markup:
    return plots.curve(name, range(1, length + 1), np.linspace(2, 1, length).tolist(), label='loss <of> "all"')


def test_spans_are_means_and_ranges_of_neighbours() -> None:
    x, mean, low, high = plots.spans(np.arange(10.0), np.arange(10.0) ** 2, limit=3)
    slices = [slice(0, 3), slice(3, 6), slice(6, 10)]
    squares = [number**2 for number in range(10)]
    assert x.tolist() == [1, 4, 7.5]
    assert mean.tolist() == pytest.approx([sum(squares[part]) / len(squares[part]) for part in slices])
    assert low.tolist() == [min(squares[part]) for part in slices]
    assert high.tolist() == [max(squares[part]) for part in slices]


@pytest.mark.parametrize("length", [1, 2, 199, 200])
def test_short_curves_are_drawn_step_by_step(length: int) -> None:
    values = np.random.default_rng(0).normal(size=length)
    x, mean, low, high = plots.spans(np.arange(length, dtype=np.float64), values)
    for series in (mean, low, high):
        assert series.tolist() == pytest.approx(values.tolist())
    assert x.tolist() == list(range(length))


def test_a_curve_has_a_band_only_when_it_is_averaged() -> None:
    assert "FillBetween" not in draw("short", plots.POINTS)
    assert "FillBetween" in draw("long", plots.POINTS + 1)


def test_svg_is_well_formed_and_points_nowhere_outside() -> None:
    svg = draw("loss")
    assert svg.startswith("<svg")
    assert "http" not in svg
    assert "<?xml" not in svg
    assert set(re.findall(r'href="(.)', svg)) <= {"#"}
    ElementTree.fromstring(str(svg).replace("<svg", '<svg xmlns:xlink="x"', 1))


def test_colours_are_those_of_the_page() -> None:
    svg = draw("loss")
    assert "currentColor" in svg
    assert "var(--blue)" in svg
    assert not re.search("#0102|#000000", svg)


def test_ids_of_two_plots_differ_and_references_follow_them() -> None:
    first, second = draw("first"), draw("second")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0].isdisjoint(ids[1])
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', first))
    assert used
    assert used <= ids[0]


def test_same_data_same_bytes() -> None:
    assert draw("loss") == draw("loss")


def test_label_is_escaped() -> None:
    assert 'aria-label="loss &lt;of&gt; &#34;all&#34;"' in draw("loss")


def test_many_differences_make_no_larger_plot_than_some() -> None:
    values = np.random.default_rng(0).normal(size=50_000).tolist()
    some = plots.differences("d", values[:1000], label="")
    assert len(plots.differences("d", values, label="")) < 1.2 * len(some)


def test_similarities_show_both_sides_on_the_given_scale() -> None:
    side = {"mean": 0.5, "histogram": [0.25, 0.75]}
    svg = plots.similarities(
        "s", {"edges": [0, 0.5, 1], "positives": side, "negatives": side}, x_limits=(-3, 3), label=""
    )
    for text in (">positives<", ">negatives<", "\N{MINUS SIGN}3<", "var(--orange)", "stroke-dasharray"):
        assert text in svg


def test_a_mark_is_a_line_that_is_always_on_the_axis() -> None:
    def draw_histogram(mark: float | None) -> str:
        return plots.histogram("h", [20, 30, 40], {"negatives": [1, 3]}, x_label="x", label="", mark=mark)

    assert draw_histogram(30).count("<path") == draw_histogram(None).count("<path") + 1
    assert ">0<" not in draw_histogram(None)
    assert ">0<" in draw_histogram(0)
