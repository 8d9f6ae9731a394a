"""Rows by the length of their longest text, as FlagEmbedding splits files."""

import math
from collections.abc import Sequence

import pytest

from rayembed.config.jobs import SplitConfig
from rayembed.data.length_split import check_bounds, file_stem, range_of, split_by_length, written_names
from rayembed.data.names import says_no_in_batch_neg

BOUNDS = SplitConfig().length_list


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def row(query: int, pos: list[int], neg: list[int]) -> dict[str, object]:
    text = "w "
    return {"query": text * query, "pos": [text * n for n in pos], "neg": [text * n for n in neg], "prompt": "p"}


@pytest.mark.parametrize("tokens", [0, 1, 499, 500, 501, 6999, 7000, 123456])
def test_a_range_begins_at_its_bound_and_ends_before_the_next(tokens: int) -> None:
    limits = [*BOUNDS, math.inf]
    (expected,) = [i for i in range(len(BOUNDS)) if limits[i] <= tokens < limits[i + 1]]
    assert range_of(tokens, BOUNDS) == expected


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
    assert file_stem("x", len(BOUNDS) - 1, BOUNDS) == "x_len-7000-inf"


@pytest.mark.parametrize("name", ["a-no_in_batch_neg", "a-no_in_batch_neg/train"])
def test_what_said_no_in_batch_neg_says_it_in_its_parts(name: str) -> None:
    stem = file_stem(name, 0, (0, 500))
    assert stem == f"{name.replace('/', '-')}_len-0-500-no_in_batch_neg"
    assert says_no_in_batch_neg(stem)


def test_files_of_one_name_in_two_folders_are_told_apart() -> None:
    names = written_names(["data/a/train.jsonl", "data/b/train.jsonl", "data/b/dev.parquet", "data/b/dev.parquet"])
    assert [*names.values()] == ["a/train", "b/train", "b/dev"]
    assert len({file_stem(name, 0, (0,)) for name in names.values()}) == 3
    with pytest.raises(ValueError, match=r"the parts of a-b/c\.jsonl and of a/b-c\.jsonl would both be called a-b-c; "):
        written_names(["a-b/c.jsonl", "a/b-c.jsonl", "z/c.jsonl"])


def test_rows_stay_with_their_lengths_however_many_are_counted_together() -> None:
    rows = [row(n % 7 + 1, [n % 5], []) for n in range(200)]
    found = list(split_by_length(rows, words, (0, 3, 5)))
    assert found == [(range_of(max(n % 7 + 1, n % 5), (0, 3, 5)), rows[n]) for n in range(200)]


@pytest.mark.parametrize("bounds", [[], [5, 10], [0, 10, 5], [0, 5, 5]])
def test_bounds_ascend_from_nought(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="allowed: numbers of tokens that ascend from 0"):
        check_bounds(bounds)
