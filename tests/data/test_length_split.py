"""Rows by the length of their longest text, as FlagEmbedding splits files."""

import math
from collections.abc import Sequence

import pytest

from rayembed.data.length_split import BOUNDS, file_stem, range_of, split_by_length


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def row(query: int, pos: list[int], neg: list[int]) -> dict[str, object]:
    text = "w "
    return {"query": text * query, "pos": [text * n for n in pos], "neg": [text * n for n in neg], "prompt": "p"}


@pytest.mark.parametrize("tokens", [0, 1, 499, 500, 501, 6999, 7000, 123456])
def test_a_range_begins_at_its_bound_and_ends_before_the_next(tokens: int) -> None:
    limits = [*BOUNDS, math.inf]
    (expected,) = [i for i in range(len(BOUNDS)) if limits[i] <= tokens < limits[i + 1]]
    assert range_of(tokens) == expected


def test_the_longest_text_decides_and_rows_stay_as_they_are() -> None:
    rows = [row(3, [1], [2]), row(1, [2, 5], []), row(1, [1], [4, 12]), row(1, [1], [1])]
    found = list(split_by_length(rows, words, (0, 3, 5)))
    assert found == [(1, rows[0]), (2, rows[1]), (2, rows[2]), (0, rows[3])]


def test_names_of_the_files() -> None:
    assert [file_stem("a", i, (0, 500, 1000)) for i in range(3)] == [
        "a_len-0-500",
        "a_len-500-1000",
        "a_len-1000-inf",
    ]
    assert file_stem("x", len(BOUNDS) - 1) == "x_len-7000-inf"


@pytest.mark.parametrize("bounds", [[], [5, 10], [0, 10, 5], [0, 5, 5]])
def test_bounds_ascend_from_nought(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="allowed: numbers of tokens that ascend from 0"):
        range_of(3, bounds)
