"""Numbers and texts of the page, at the edges of their formats."""

import math

import pytest

from rayembed.report import wording


@pytest.mark.parametrize(("length", "expected"), [(299, 299), (300, 300), (301, 300), (5000, 300)])
def test_texts_are_cut_at_three_hundred_characters(length: int, expected: int) -> None:
    text = wording.shorten("x" * length)
    assert len(text) == expected
    assert text.endswith("…") == (length > 300)


def test_no_space_before_the_ellipsis() -> None:
    assert wording.shorten("one two", limit=5) == "one…"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "+0.0400"), (-0.04, "\N{MINUS SIGN}0.0400"), (0.0, "0.0000"), (-1e-9, "0.0000"), (None, "–")],  # noqa: RUF001
)
def test_differences_carry_their_sign(value: float | None, text: str) -> None:
    assert wording.signed(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (0.123456, "0.1235"),
        (math.nan, "nan"),
        (True, "yes"),
        (None, "–"),  # noqa: RUF001
        (["a", 1], '["a", 1]'),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_any_json_value_has_a_wording(value: object, text: str) -> None:
    assert wording.quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (60, "1 min 00 s"), (750.4, "12 min 30 s"), (11_100, "3 h 05 min")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(("name", "label"), [("ndcg@10", "nDCG@10"), ("mrr@100", "MRR@100"), ("odd", "odd")])
def test_metric_labels(name: str, label: str) -> None:
    assert wording.metric_label(name) == label
