"""Thirds of long positives change places for a share of the rows, and nothing else changes."""

from itertools import permutations

import numpy as np
import pytest

from rayembed.data.shuffle import SHORT, shuffled_positive

LONG = np.array([101, *range(1, 41), 102], np.int32)  # thirds of 14, 14 and 12


def shuffled(row: int, epoch: int = 0, *, ratio: float = 1.0, seed: int = 0, before: int = 1) -> list[int]:
    found = shuffled_positive(LONG, seed=seed, epoch=epoch, row=row, ratio=ratio, before=before, after=1)
    assert found.dtype == np.int32
    return found.tolist()


def test_thirds_change_places_and_special_tokens_stay() -> None:
    thirds = [list(range(1, 15)), list(range(15, 29)), list(range(29, 41))]
    expected = {(101, *a, *b, *c, 102) for a, b, c in permutations(thirds)}
    assert {tuple(shuffled(row)) for row in range(100)} == expected
    assert {tuple(found[:6]) for found in (shuffled(row, before=5) for row in range(100))} == {
        (101, 1, 2, 3, 4, start) for start in (5, 18, 31)
    }


def test_the_share_of_rows_is_the_ratio() -> None:
    changed = sum(shuffled(row, ratio=0.3) != LONG.tolist() for row in range(2000))
    assert changed / 2000 == pytest.approx(0.3 * 5 / 6, abs=0.03)
    assert all(shuffled(row, ratio=0) == LONG.tolist() for row in range(50))


def test_short_positives_stay() -> None:
    for number, stays in ((SHORT, True), (SHORT + 1, False)):
        text = np.arange(number + 2, dtype=np.int32)
        found = {
            tuple(shuffled_positive(text, seed=0, epoch=0, row=row, ratio=1, before=1, after=1).tolist())
            for row in range(40)
        }
        assert (found == {tuple(range(number + 2))}) == stays


def test_without_special_tokens() -> None:
    text = np.arange(30, dtype=np.int32)
    found = shuffled_positive(text, seed=0, epoch=0, row=3, ratio=1, before=0, after=0)
    assert sorted(found.tolist()) == list(range(30))


def test_a_draw_is_a_function_of_seed_epoch_and_row() -> None:
    assert shuffled(3, 2) == shuffled(3, 2)
    for changed in ([shuffled(3, e) for e in range(30)], [shuffled(3, seed=s) for s in range(30)]):
        assert len({tuple(each) for each in changed}) == 6
