"""Batches and groups are pure functions of seed, epoch and number: nothing else moves them."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from rayembed.data.plan import BatchPlan, choose_group, total_batches


def test_batches_do_not_depend_on_the_order_of_asking() -> None:
    forward = [BatchPlan(23, 4, seed=1).rows(number).tolist() for number in range(20)]
    plan, numbers = BatchPlan(23, 4, seed=1), list(range(20))
    random.Random(0).shuffle(numbers)
    assert {number: plan.rows(number).tolist() for number in numbers} == dict(enumerate(forward))


def test_each_epoch_is_a_permutation_less_the_rows_left_out() -> None:
    plan = BatchPlan(23, 4, seed=1)
    assert (plan.batches_per_epoch, plan.rows_left_out) == (5, 3)
    epochs = [np.concatenate([plan.rows(5 * epoch + i) for i in range(5)]).tolist() for epoch in range(4)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == 20
        assert set(rows) <= set(range(23))
    assert len({tuple(rows) for rows in epochs}) == 4
    assert set().union(*epochs) == set(range(23)), "other rows sit out in other epochs"
    assert [plan.epoch(number) for number in (0, 4, 5, 14, 15)] == [0, 0, 1, 2, 3]


def test_another_seed_is_another_order() -> None:
    orders = {tuple(BatchPlan(12, 12, seed=seed).rows(0).tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_whole_batches_leave_nothing_out() -> None:
    plan = BatchPlan(8, 4, seed=0)
    assert plan.rows_left_out == 0
    assert sorted([*plan.rows(0), *plan.rows(1)]) == list(range(8))


def test_a_batch_cannot_be_changed_for_those_who_ask_later() -> None:
    plan = BatchPlan(8, 4, seed=0)
    with pytest.raises(ValueError, match="read-only"):
        plan.rows(0)[0] = 7


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"3 training rows do not fill one batch of 4 queries; lower train\.per_device"
    ):
        BatchPlan(3, 4, seed=0)


def group(row: int, epoch: int = 0, *, seed: int = 5, num_neg: int = 10, group_size: int = 4) -> tuple[int, list[int]]:
    positive, negatives = choose_group(seed, epoch, row, num_pos=3, num_neg=num_neg, group_size=group_size)
    return positive, negatives.tolist()


@pytest.mark.parametrize("num_neg", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_negatives_repeat_only_where_there_are_too_few_and_then_evenly(num_neg: int, group_size: int) -> None:
    for row in range(30):
        positive, negatives = group(row, num_neg=num_neg, group_size=group_size)
        assert positive in range(3)
        assert len(negatives) == group_size - 1
        times = Counter(negatives)
        assert set(times) <= set(range(num_neg))
        for negative in range(num_neg) if group_size > 1 else ():
            assert times[negative] in {(group_size - 1) // num_neg, math.ceil((group_size - 1) / num_neg)}


def test_a_group_depends_on_row_epoch_and_seed_alone() -> None:
    alone = group(7)
    for other in range(20):
        group(other)
    assert group(7) == alone
    assert len({str(group(7, epoch)) for epoch in range(8)}) > 4
    assert len({str(group(row)) for row in range(8)}) > 4
    assert len({str(group(7, seed=seed)) for seed in range(8)}) > 4


def test_every_positive_and_negative_has_its_turn() -> None:
    groups = [group(row, num_neg=5, group_size=3) for row in range(600)]
    positives = Counter(positive for positive, _ in groups)
    assert all(positives[i] == pytest.approx(200, abs=50) for i in range(3))
    for place in range(2):
        negatives = Counter(negatives[place] for _, negatives in groups)
        assert all(negatives[i] == pytest.approx(120, abs=40) for i in range(5))


def test_the_place_of_a_repeated_negative_is_drawn_too() -> None:
    firsts = {group(row, num_neg=2, group_size=8)[1][0] for row in range(40)}
    assert firsts == {0, 1}


@pytest.mark.parametrize(
    ("epochs", "max_steps", "accumulation", "expected"),
    [(1.0, None, 1, 5), (2.0, None, 1, 10), (0.5, None, 1, 2), (1.0, None, 2, 4), (0.1, None, 3, 3), (9.0, 7, 2, 14)],
)
def test_training_is_a_whole_number_of_steps(
    epochs: float, max_steps: int | None, accumulation: int, expected: int
) -> None:
    plan = BatchPlan(23, 4, seed=0)
    found = total_batches(plan, num_train_epochs=epochs, max_steps=max_steps, accumulation=accumulation)
    assert found == expected
