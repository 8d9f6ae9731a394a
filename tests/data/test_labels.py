"""Positives and negatives of labelled rows: of the right labels and dataset, each in its turn, pure."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from rayembed.data.datasets import Datasets, read_datasets
from rayembed.data.labels import LabelIndex, choose_labelled_group
from tests.data.small_datasets import experiment, labelled, plain, store

LABELS = {"a": "xyxxyzz", "b": "xxyyw"}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    rows = [*labelled("a", "xyx"), *plain("r", 3), *labelled("b", LABELS["b"]), *labelled("a", "xyzz")]
    return read_datasets(store(tmp_path_factory.mktemp("s"), rows), experiment())


WHERE = [*zip("aaa", "xyx", strict=True), *[("r", "")] * 3, *zip("bbbbb", "xxyyw", strict=True)]
WHERE += [*zip("aaaa", "xyzz", strict=True)]
ROWS = [i for i, (name, label) in enumerate(WHERE) if name != "r" and label != "w"]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("group_size", [1, 2, 3, 6, 8])
def test_a_group_is_of_its_dataset_and_right_labels(datasets: Datasets, row: int, group_size: int) -> None:
    index = LabelIndex.of(datasets)
    name, label = WHERE[row]
    others = {i for i in ROWS if WHERE[i][0] == name and WHERE[i][1] != label}
    for epoch in range(12):
        positive, negatives = choose_labelled_group(3, epoch, row, index=index, group_size=group_size)
        assert positive != row
        assert WHERE[positive] == (name, label)
        assert len(negatives) == group_size - 1
        assert set(negatives.tolist()) <= others
        times = Counter({other: 0 for other in others}) + Counter(negatives.tolist())
        assert len(times) == min(group_size - 1, len(others))
        assert max([0, *times.values()]) <= -(-(group_size - 1) // len(others))


def test_every_row_has_its_turn(datasets: Datasets) -> None:
    index = LabelIndex.of(datasets)
    groups = [choose_labelled_group(1, epoch, 0, index=index, group_size=3) for epoch in range(900)]
    positives = Counter(positive for positive, _ in groups)
    assert positives.keys() == {2, 11}
    assert positives[2] == pytest.approx(450, abs=60)
    for place in range(2):
        negatives = Counter(int(negatives[place]) for _, negatives in groups)
        assert negatives.keys() == {1, 12, 13, 14}
        assert all(number == pytest.approx(225, abs=50) for number in negatives.values())


def test_a_choice_is_a_function_of_seed_epoch_and_row(datasets: Datasets) -> None:
    index = LabelIndex.of(datasets)

    def group(seed: int, epoch: int) -> tuple[int, tuple[int, ...]]:
        positive, negatives = choose_labelled_group(seed, epoch, 0, index=index, group_size=3)
        return positive, tuple(negatives.tolist())

    assert group(1, 5) == group(1, 5)
    assert len({group(1, epoch) for epoch in range(20)}) > 8
    assert len({group(seed, 0) for seed in range(20)}) > 8


def test_a_choice_among_millions_copies_none_of_them() -> None:
    rows = 2_000_000
    labels = np.repeat(np.arange(2, dtype=np.int32), rows // 2)
    bounds = np.array([[0, rows], [0, rows]])
    index = LabelIndex(np.arange(rows), labels, np.array([0, rows // 2, rows]), bounds)
    tracemalloc.start()
    try:
        for row in (0, rows - 1):
            positive, negatives = choose_labelled_group(0, 0, row, index=index, group_size=8)
            assert labels[positive] == labels[row]
            assert set(labels[negatives]) == {1 - labels[row]}
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
