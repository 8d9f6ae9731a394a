"""Which dataset is next and which of its batches: pure functions, shares as asked for, nothing lost."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayembed.data.datasets import read_datasets
from rayembed.data.mixing import MixedPlan, batch_plan, shares
from rayembed.data.passes import TextKeys
from rayembed.data.plan import BatchPlan, Plan
from tests.data.small_datasets import Rows, experiment, labelled, plain, store

THREE = [*plain("a", 21), *plain("b", 7), *plain("c", 12)]
OF = np.repeat([0, 1, 2], [21, 7, 12])


def plan(tmp_path: Path, rows: Rows = THREE, **settings: Any) -> MixedPlan:  # noqa: ANN401
    settings = {"same_dataset_within_batch": True} | settings
    run = experiment(**settings)
    stored = store(tmp_path, rows)
    keys = TextKeys.of(stored) if run.data.no_duplicates_within_batch else None
    lengths = np.arange(len(rows), dtype=np.int32) if run.data.length_grouping else None
    found = batch_plan(read_datasets(stored, run), run, lengths=lengths, keys=keys)
    assert isinstance(found, MixedPlan)
    return found


def epoch_of(found: Plan, epoch: int) -> list[list[int]]:
    first = epoch * found.batches_per_epoch
    return [found.rows(first + i).tolist() for i in range(found.batches_per_epoch)]


@pytest.mark.parametrize(
    ("batches", "weights", "mixing", "expected"),
    [
        ([10, 3, 6], [1, 1, 1], "proportional", [10, 3, 6]),
        ([10, 3, 6], [1, 2, 0.5], "proportional", [10, 6, 3]),
        ([10, 3], [1, 0.01], "proportional", [10, 1]),
        ([90, 10], [1, 1], "temperature", [75, 25]),
        ([90, 10], [1, 9], "temperature", [90, 90]),
        ([10, 3, 6], [1, 1, 1], "round_robin", [7, 6, 6]),
        ([10, 3, 6], [1, 1, 2], "round_robin", [6, 6, 13]),
        ([7], [1], "round_robin", [7]),
    ],
)
def test_shares(batches: list[int], weights: list[float], mixing: str, expected: list[int]) -> None:
    assert shares(batches, weights, mixing=mixing, temperature=2.0) == expected


def test_temperature_one_is_proportional_and_a_high_one_is_even() -> None:
    assert shares([50, 7, 3], [1, 1, 1], mixing="temperature", temperature=1.0) == [50, 7, 3]
    assert shares([50, 7, 3], [1, 1, 1], mixing="temperature", temperature=1e9) == [20, 20, 20]


def test_each_batch_is_of_one_dataset_and_each_row_has_its_turn(tmp_path: Path) -> None:
    found = plan(tmp_path, workers=2)  # batches of 4
    assert (found.num_rows, found.rows_left_out, found.batches_per_epoch) == (40, 4, 9)
    assert (found.batches, [found.left_out(i) for i in range(3)]) == ((5, 1, 3), [1, 3, 0])
    seen = set[int]()
    for epoch in range(6):
        batches = epoch_of(found, epoch)
        rows = [row for batch in batches for row in batch]
        assert len(rows) == len(set(rows)) == 36
        seen |= set(rows)
        for i, batch in enumerate(batches):
            number = epoch * 9 + i
            assert set(OF[batch]) == {found.dataset(number)}
            assert found.epoch(number) == found.dataset_epoch(number) == epoch
    assert seen == set(range(40))


def test_batches_do_not_depend_on_the_order_of_asking(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mixing": "temperature", "no_duplicates_within_batch": True}
    rows = [row | {"pos": [f"p{i % 9}"]} for i, row in enumerate(THREE)]
    first = plan(tmp_path / "1", rows, **settings)
    forward = [first.rows(number).tolist() for number in range(90)]
    numbers = list(range(90))
    random.Random(0).shuffle(numbers)
    second = plan(tmp_path / "2", rows, **settings)
    assert {number: second.rows(number).tolist() for number in numbers} == dict(enumerate(forward))


def test_workers_share_the_batches_of_a_global_size(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"global_batch_size": 4}, "datasets": [{"name": "b", "batch_size": 2}]}
    one, two = plan(tmp_path / "1", workers=1, **settings), plan(tmp_path / "2", workers=2, **settings)
    assert epoch_of(one, 0) == epoch_of(two, 0)
    assert {len(batch) for batch in epoch_of(one, 0)} == {2, 4}


def test_other_seeds_and_epochs_are_other_orders(tmp_path: Path) -> None:
    orders = set()
    for seed in range(3):
        found = plan(tmp_path / str(seed), seed=seed)
        orders |= {str(epoch_of(found, epoch)) for epoch in range(3)}
        orders |= {str([found.dataset(epoch * 19 + i) for i in range(19)]) for epoch in range(3)}
    assert len(orders) == 18


def test_a_dataset_keeps_its_batches_when_others_join(tmp_path: Path) -> None:
    alone = plan(tmp_path / "1", plain("b", 7))
    joined = plan(tmp_path / "2", [*plain("a", 4), *plain("b", 7)])
    of_b = [(joined.rows(i) - 4).tolist() for i in range(2 * joined.batches_per_epoch) if joined.dataset(i) == 1]
    assert of_b == epoch_of(alone, 0) + epoch_of(alone, 1)


def test_passes_follow_one_another_whatever_the_share(tmp_path: Path) -> None:
    found = plan(tmp_path, datasets=[{"name": "b", "weight": 2.5}, {"name": "c", "weight": 0.5}])
    assert found.shares == (10, 8, 3)
    numbers = range(6 * found.batches_per_epoch)
    for dataset, batches in enumerate(found.batches):
        mine = [number for number in numbers if found.dataset(number) == dataset]
        assert len(mine) == 6 * found.shares[dataset]
        assert [found.dataset_epoch(number) for number in mine] == [k // batches for k in range(len(mine))]
        for start in range(0, len(mine) - batches + 1, batches):
            rows = [row for number in mine[start : start + batches] for row in found.rows(number).tolist()]
            assert len(rows) == len(set(rows)) == 2 * batches


def test_round_robin_takes_turns(tmp_path: Path) -> None:
    found = plan(tmp_path, mixing="round_robin")
    assert found.shares == (7, 6, 6)
    order = [found.dataset(i) for i in range(19)]
    assert all(set(order[i : i + 3]) == {0, 1, 2} for i in range(0, 18, 3) if i != 9)
    assert [found.dataset(19 + i) for i in range(19)] == order


def test_shares_are_mixed_evenly_over_an_epoch(tmp_path: Path) -> None:
    found = plan(tmp_path, [*plain("a", 2000), *plain("b", 200)])
    halves = Counter((i < 550, found.dataset(i)) for i in range(1100))
    assert halves[True, 1] == pytest.approx(50, abs=20)
    assert halves[True, 1] + halves[False, 1] == 100


def test_rows_that_are_in_no_batch_are_never_drawn(tmp_path: Path) -> None:
    found = plan(tmp_path, [*labelled("a", "xyxz"), *labelled("b", "xxyy"), *labelled("a", "y")])
    rows = [row for batch in epoch_of(found, 0) for row in batch]
    assert sorted(rows) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert "1 row alone with their label left out" in found.notes()[0]


def test_a_dataset_too_small_for_a_batch_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    found = plan(tmp_path, [*plain("a", 8), *plain("b", 1)])
    assert found.shares == (4, 0)
    assert {found.dataset(i) for i in range(12)} == {0}
    assert found.rows_left_out == 1
    assert "dataset b: 1 row, 0 batches a pass, 0 of 4 batches an epoch" in found.notes()[1]
    assert found.notes()[1].endswith("; 1 row of a pass in no batch")
    with pytest.raises(
        ValueError, match=r"no dataset fills one batch \(a: 1 row, b: 1 row; batches of 2 queries\); low"
    ):
        plan(tmp_path / "none", [*plain("a", 1), *plain("b", 1)])


def test_a_text_twice_waits_in_every_epoch(tmp_path: Path) -> None:
    rows = [row | {"query": f"q{i % 5}", "pos": [f"p{i}"]} for i, row in enumerate(plain("a", 23))]
    found = plan(tmp_path, rows, train={"per_device_train_batch_size": 4}, no_duplicates_within_batch=True)
    assert 4 <= found.batches_per_epoch <= 5
    for number in range(10 * found.batches_per_epoch):
        assert len({row % 5 for row in found.rows(number).tolist()}) == 4


def test_rows_that_all_share_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset fills one batch without a text twice \(data\.no_dup"):
        plan(tmp_path, no_duplicates_within_batch=True)


@pytest.mark.parametrize("texts", [["a", "a", "a", "b", "c"], ["ab", "a", "b"]])
def test_a_pass_that_places_fewer_texts_repeats_some(tmp_path: Path, texts: list[str]) -> None:
    rows = [row | {"query": f"q{i}", "pos": list(texts[i])} for i, row in enumerate(plain("a", len(texts)))]
    seeds = []
    for seed in range(30):
        try:
            found = plan(tmp_path / str(seed), rows, no_duplicates_within_batch=True, seed=seed)
        except ValueError:  # the first pass has none, which is what is counted
            continue
        passes = [len(found._pass(0, number).starts) for number in range(30)]
        if min(passes) == found.batches[0]:
            continue
        seeds.append(seed)
        for number in range(30 * found.batches_per_epoch):
            first, second = found.rows(number).tolist()
            assert not set(texts[first]) & set(texts[second])
            assert found.dataset_epoch(number) == number // found.batches[0]
    assert seeds


def test_batches_of_similar_length_have_their_own_size(tmp_path: Path) -> None:
    entries = [{"max_len": 9, "batch_size": 5}, {"max_len": 19, "batch_size": 3}]
    rows = plain("a", 40)
    found = plan(tmp_path, rows, same_dataset_within_batch=False, length_grouping=True, batch_size_by_length=entries)
    assert found.global_batch_size == 5
    sizes = Counter(len(batch) for batch in epoch_of(found, 0))
    assert sizes == {5: 2, 3: 3, 2: 10}
    for batch in epoch_of(found, 1):
        assert max(batch) <= {5: 9, 3: 19, 2: 39}[len(batch)]


def test_plain_rows_keep_the_plan_they_had(tmp_path: Path) -> None:
    run = experiment(workers=3)
    found = batch_plan(read_datasets(store(tmp_path, THREE), run), run)
    assert found == BatchPlan(40, 6, 42)
    assert (found.dataset(7), found.dataset_epoch(7), found.epoch(7)) == (0, 1, 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("length_grouping", "data.length_grouping needs the lengths"),
        ("no_duplicates_within_batch", "data.no_duplicates_within_batch needs the texts"),
    ],
)
def test_what_a_setting_needs_must_be_given(tmp_path: Path, setting: str, message: str) -> None:
    run = experiment(**{setting: True})
    with pytest.raises(ValueError, match=message):
        batch_plan(read_datasets(store(tmp_path, THREE), run), run)


def test_two_passes_of_each_dataset_are_remembered(tmp_path: Path) -> None:
    found = plan(tmp_path)
    for number in range(10 * found.batches_per_epoch):
        found.rows(number)
    assert Counter(dataset for dataset, _ in found._passes) == {0: 2, 1: 2, 2: 2}
    assert len(found._sequences) == 2


def test_a_batch_cannot_be_changed_for_those_who_ask_later(tmp_path: Path) -> None:
    found = plan(tmp_path)
    before = found.rows(0).tolist()
    found.rows(0)[0] = 10**6
    assert found.rows(0).tolist() == before
