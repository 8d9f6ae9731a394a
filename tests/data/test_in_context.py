"""Which rows are in-context examples: a pure function of seed, epoch and row."""

from collections import Counter

import numpy as np
import pytest

from rayembed.config.families import IclConfig
from rayembed.data.in_context import draw_examples, have_examples

BATCH = np.arange(100, 116)


def test_examples_are_other_rows_of_the_batch_and_each_once() -> None:
    for row in BATCH.tolist():
        for epoch in range(20):
            wanted, others = draw_examples(7, epoch, row, batch=BATCH, most=5)
            assert len(others) == len(set(others)) == 2 * wanted
            assert row not in others
            assert {*others} <= {*BATCH.tolist()}


def test_each_number_of_examples_is_as_likely() -> None:
    numbers = Counter(draw_examples(0, epoch, 100, batch=BATCH, most=5)[0] for epoch in range(3000))
    assert {*numbers} == {0, 1, 2, 3, 4, 5}
    assert max(abs(count - 500) for count in numbers.values()) < 5 * np.sqrt(500 * 5 / 6)


def test_rows_are_drawn_anew_for_row_epoch_and_seed_and_else_the_same() -> None:
    def drawn(seed: int, epoch: int) -> list[tuple[int, list[int]]]:
        return [draw_examples(seed, epoch, row, batch=BATCH, most=5) for row in BATCH.tolist()]

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(1, 0) != drawn(1, 1)
    assert drawn(1, 0) != drawn(2, 0)
    assert len({tuple(others) for _, others in drawn(1, 0)}) > 8


def test_a_batch_of_one_row_has_no_examples() -> None:
    assert draw_examples(0, 0, 5, batch=[5], most=5)[1] == []


@pytest.mark.parametrize(
    ("kind", "of_all", "of_some"),
    [
        (None, True, False),
        ("normal", True, False),
        ("only_1neg", True, False),
        ("symmetric_sts", True, True),
        ("symmetric_class", True, True),
        ("symmetric_clustering", True, True),
        ("class", True, True),
        ("sts", False, False),
    ],
)
def test_which_types_have_examples(kind: str | None, of_all: bool, of_some: bool) -> None:
    assert have_examples(IclConfig(), kind) is of_all
    assert have_examples(IclConfig(retrieval_use_examples=False), kind) is of_some
