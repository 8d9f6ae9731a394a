"""Batches of one pass: by length, without a text twice, nothing lost on the way."""

from pathlib import Path

import numpy as np
import pytest

from rayembed.data.passes import Bucket, Pass, TextKeys, buckets_of, one_pass, without_duplicates
from tests.data.small_datasets import plain, store


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def lists(found: Pass) -> list[list[int]]:
    return [found.rows[start:stop].tolist() for start, stop in zip(found.starts, found.stops, strict=True)]


def keys(*rows: str) -> TextKeys:
    """A row's keys are its letters."""
    offsets = np.cumsum([0, *map(len, rows)])
    return TextKeys(offsets, np.array([ord(letter) for row in rows for letter in row]))


def test_rows_go_to_the_first_bucket_that_is_long_enough() -> None:
    lengths = np.array([3, 16, 17, 40, 32, 1], np.int32)
    found = buckets_of(np.array([0, 1, 2, 3, 4]), ((16, 8), (32, 4), (None, 2)), lengths)
    assert [(bucket.rows.tolist(), bucket.batch_size) for bucket in found] == [([0, 1], 8), ([2, 4], 4), ([3], 2)]
    (whole,) = buckets_of(np.array([5, 1]), ((16, 8), (None, 2)), None)
    assert (whole.rows.tolist(), whole.batch_size) == ([5, 1], 2)


def test_each_row_is_in_one_batch_less_those_left_over() -> None:
    found = lists(one_pass(rng(), [Bucket(np.arange(10, 33), 4)]))
    assert [len(batch) for batch in found] == [4] * 5
    rows = [row for batch in found for row in batch]
    assert len(set(rows)) == 20
    assert set(rows) < set(range(10, 33))
    assert rows != sorted(rows)


def test_rows_left_over_by_short_buckets_go_to_longer_ones() -> None:
    lengths = np.array([1] * 7 + [2] * 3 + [9] * 3, np.int32)
    sizes = ((1, 4), (2, 3), (None, 2))
    for seed in range(5):
        found = lists(one_pass(rng(seed), buckets_of(np.arange(13), sizes, lengths), lengths=lengths))
        assert sorted(map(len, found)) == [2, 3, 3, 4]
        rows = [row for batch in found for row in batch]
        assert len(rows) == len(set(rows)) == 4 + 6 + 2
        for batch in found:
            limit = {4: 1, 3: 2, 2: 9}[len(batch)]
            assert max(lengths[batch]) <= limit


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = rng(1).integers(1, 500, 2000).astype(np.int32)
    whole = [Bucket(np.arange(2000), 10)]

    def padding(found: list[list[int]]) -> float:
        padded = sum(int(lengths[batch].max()) * len(batch) for batch in found)
        return 1 - sum(int(lengths[batch].sum()) for batch in found) / padded

    grouped = lists(one_pass(rng(), whole, lengths=lengths))
    assert padding(grouped) < 0.05 < 0.3 < padding(lists(one_pass(rng(), whole)))
    assert len({row for batch in grouped for row in batch}) == 2000
    again = lists(one_pass(rng(5), whole, lengths=lengths))
    assert {tuple(sorted(batch)) for batch in grouped}.isdisjoint(tuple(sorted(batch)) for batch in again)
    longest = [int(lengths[batch].max()) for batch in grouped]
    assert longest[:64] != sorted(longest[:64]), "batches of any length follow one another"


def test_what_is_left_over_is_no_longer_than_the_rest() -> None:
    lengths = np.arange(19, dtype=np.int32)
    left = set()
    for seed in range(30):
        found = lists(one_pass(rng(seed), [Bucket(np.arange(19), 6)], lengths=lengths))
        left |= set(range(19)) - {row for batch in found for row in batch}
    assert len(left) > 10


def slow_deferral(order: list[int], size: int, letters: list[str]) -> tuple[list[list[int]], list[int]]:
    """Batch by batch, always the first row that fits."""
    waiting, found = list(order), []
    while True:
        batch: list[int] = []
        for row in waiting:
            if len(batch) < size and not any(set(letters[row]) & set(letters[other]) for other in batch):
                batch.append(row)
        if len(batch) < size:
            return found, waiting
        found.append(batch)
        waiting = [row for row in waiting if row not in batch]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_key_is_twice_in_a_batch(seed: int, size: int) -> None:
    letters = ["".join(rng(seed * 100 + i).choice(list("abcdefghij"), 2)) for i in range(30)]
    order = rng(seed).permutation(30)
    batches, left = without_duplicates(order, size, keys(*letters))
    expected, expected_left = slow_deferral(order.tolist(), size, letters)
    assert batches.reshape(-1, size).tolist() == expected
    assert sorted(left.tolist()) == sorted(expected_left)


def test_many_equal_rows_do_not_stop_the_others() -> None:
    letters = ["a"] * 500 + [chr(1000 + i) for i in range(300)]
    batches, left = without_duplicates(np.arange(800), 2, keys(*letters))
    assert len(batches) + len(left) == 800
    assert len(batches) == 600
    assert all(letters[a] != letters[b] for a, b in batches.reshape(-1, 2).tolist())


@pytest.mark.parametrize("by_length", [False, True])
def test_a_pass_without_duplicates(by_length: bool) -> None:
    letters = [chr(97 + i % 7) for i in range(60)]
    lengths = rng().integers(1, 30, 60).astype(np.int32) if by_length else None
    buckets = buckets_of(np.arange(60), ((10, 6), (None, 4)), lengths)
    found = lists(one_pass(rng(), buckets, lengths=lengths, keys=keys(*letters)))
    rows = [row for batch in found for row in batch]
    assert len(rows) == len(set(rows)) > 45
    assert all(len({letters[row] for row in batch}) == len(batch) for batch in found)


def test_keys_are_of_the_query_and_all_positives(tmp_path: Path) -> None:
    rows = [
        *plain("a", 1, query="x", pos=["y", "z", "z"]),
        *plain("b", 1, query="y", pos=["x"]),
        *plain("c", 1, query="x", pos=[]),
        *plain("d", 1, query="w", pos=["v", "z"]),
    ]
    found = TextKeys.of(store(tmp_path, rows, rows_per_part=3))
    of = [set(found.of_row(i)) for i in range(4)]
    assert [len(found.of_row(i)) for i in range(4)] == [3, 2, 1, 3]
    assert [[len(a & b) for b in of] for a in of] == [[3, 0, 1, 1], [0, 2, 0, 0], [1, 0, 1, 0], [1, 0, 0, 3]]
