"""Which row is of which dataset, and how each is trained on: by type, by name, and by data.datasets."""

from pathlib import Path
from typing import Any

import pytest

from rayembed.data.datasets import Dataset, Datasets, read_datasets
from tests.data.small_datasets import experiment, labelled, plain, store


def one(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Dataset:  # noqa: ANN401
    (found,) = read(tmp_path, rows, **settings).items
    return found


def read(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Datasets:  # noqa: ANN401
    return read_datasets(store(tmp_path, rows), experiment(**settings))


def test_rows_without_anything_of_their_own_share_batches(tmp_path: Path) -> None:
    found = read(tmp_path, [*plain("a", 7), *plain("b", 4, type="normal")], workers=3)
    assert found.items == (
        Dataset(
            name="",
            type=None,
            num_rows=11,
            batch_sizes=((None, 6),),
            group_size=3,
            loss="info_nce",
            no_in_batch_neg=False,
            weight=1.0,
        ),
    )
    assert found.dataset_of_row.tolist() == [0] * 11


def test_rows_are_of_the_dataset_they_name_in_any_order(tmp_path: Path) -> None:
    rows = [*plain("a", 3), *plain("b", 4), *plain("a", 2), *plain("c", 3)]
    found = read(tmp_path, rows, same_dataset_within_batch=True)
    assert [(item.name, item.num_rows) for item in found.items] == [("a", 5), ("b", 4), ("c", 3)]
    assert found.dataset_of_row.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2]
    assert set(found.labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("name", "more", "datasets"),
    [
        ("a", {"type": "only_1neg"}, []),
        ("a", {"type": "symmetric_sts"}, []),
        ("a", {"type": "sts", "pos_scores": [1.0], "neg": []}, []),
        ("x-no_in_batch_neg", {}, []),
        ("x-no_in_batch_neg/train", {}, []),
        ("a", {}, [{"name": "a", "batch_size": 2}]),
        ("a", {}, [{"name": "a", "train_group_size": 2}]),
        ("a", {}, [{"name": "a", "loss": "info_nce"}]),
        ("a", {}, [{"name": "a", "weight": 1}]),
        ("a", {}, [{"name": "a", "no_in_batch_neg": False}]),
    ],
)
def test_what_is_of_a_batch_as_a_whole_parts_the_datasets(
    tmp_path: Path, name: str, more: dict[str, object], datasets: list[object]
) -> None:
    found = read(tmp_path, [*plain(name, 2, **more), *plain("b", 2)], datasets=datasets)
    assert [item.name for item in found.items] == [name, "b"]


def test_a_prompt_alone_does_not(tmp_path: Path) -> None:
    assert one(tmp_path, [*plain("a", 2), *plain("b", 2)], datasets=[{"name": "a", "prompt": "p"}]).name == ""


@pytest.mark.parametrize(
    ("kind", "negatives", "own", "expected"),
    [
        (None, 2, None, 8),
        ("only_1neg", 2, None, 2),
        ("only_1neg", 2, 5, 5),
        ("symmetric_class", 3, None, 4),
        ("symmetric_class", 9, None, 8),
        ("symmetric_class", 0, None, 8),
        ("symmetric_clustering", 3, None, 8),
        ("symmetric_sts", 3, 4, 4),
        ("class", 0, None, 8),
    ],
)
def test_group_size(tmp_path: Path, kind: str | None, negatives: int, own: int | None, expected: int) -> None:
    rows = plain("a", 4, type=kind, neg=[str(i) for i in range(negatives)])
    if kind == "class":
        rows = labelled("a", "xxyy")
    found = one(
        tmp_path,
        rows,
        train_group_size=8,
        same_dataset_within_batch=True,
        datasets=[{"name": "a", "train_group_size": own}],
    )
    assert found.group_size == expected


def test_the_fewest_negatives_of_a_dataset_decide(tmp_path: Path) -> None:
    kind: dict[str, object] = {"type": "symmetric_class"}
    rows = [
        *plain("a", 6, **kind, neg=["1", "2", "3"]),
        *plain("b", 1, **kind, neg=["1"]),
        *plain("a", 1, **kind, neg=["1", "2"]),
        *plain("a", 1, **kind, neg=[]),  # refused elsewhere
    ]
    assert [item.group_size for item in read(tmp_path, rows, train_group_size=8).items] == [3, 2]


@pytest.mark.parametrize(
    ("kind", "train", "data", "expected"),
    [
        (None, {}, {}, ((None, 6),)),
        ("symmetric_class", {"per_device_train_batch_size": 5}, {}, ((None, 6),)),
        ("symmetric_sts", {"per_device_train_batch_size": 1}, {}, ((None, 3),)),
        ("symmetric_sts", {}, {"datasets": [{"name": "a", "batch_size": 7}]}, ((None, 21),)),
        (None, {"global_batch_size": 12}, {}, ((None, 12),)),
        ("symmetric_sts", {"global_batch_size": 12}, {}, ((None, 6),)),
        (None, {"global_batch_size": 12}, {"datasets": [{"name": "a", "batch_size": 3}]}, ((None, 3),)),
        (
            "symmetric_sts",
            {},
            {"length_grouping": True, "batch_size_by_length": [{"max_len": 16, "batch_size": 8}]},
            ((16, 12), (None, 3)),
        ),
        (
            None,
            {},
            {
                "length_grouping": True,
                "batch_size_by_length": [{"max_len": 16, "batch_size": 8}],
                "datasets": [{"name": "a", "batch_size": 2}],
            },
            ((None, 6),),
        ),
    ],
)
def test_batch_sizes_on_three_workers(
    tmp_path: Path, kind: str | None, train: dict[str, object], data: dict[str, object], expected: object
) -> None:
    rows = plain("a", 4, type=kind)
    found = one(tmp_path, rows, workers=3, train=train, same_dataset_within_batch=True, **data)
    assert found.batch_sizes == expected


def test_batches_must_fit_any_number_of_workers_that_may_be(tmp_path: Path) -> None:
    rows, train = plain("a", 4), {"global_batch_size": 12}
    entry = {"name": "a", "batch_size": 6}
    assert one(tmp_path / "1", rows, workers=(2, 3), train=train, datasets=[entry]).batch_sizes == ((None, 6),)
    message = (
        r"'a' has batches of 9 queries, not a multiple of 6, which ray\.num_workers \[2, 3\] needs; .*that is \(12\)"
    )
    with pytest.raises(ValueError, match=message):
        one(tmp_path / "2", rows, workers=(2, 3), train=train, datasets=[{**entry, "batch_size": 9}])


def test_in_batch_negatives_of_one_dataset_must_not_depend_on_the_workers(tmp_path: Path) -> None:
    rows, entry = plain("a", 4), {"name": "a", "no_in_batch_neg": False}
    train = {"global_batch_size": 12, "negatives_cross_device": False, "no_in_batch_neg": True}
    with pytest.raises(ValueError, match=r"dataset 'a' has in-batch negatives, of which a query would have more"):
        one(tmp_path / "1", rows, workers=(2, 3), train=train, datasets=[entry])
    one(tmp_path / "2", rows, workers=(2, 3), train={**train, "negatives_cross_device": True}, datasets=[entry])


def test_half_a_global_batch_must_fit_the_workers(tmp_path: Path) -> None:
    rows = plain("a", 4, type="symmetric_sts")
    with pytest.raises(ValueError, match=r"dataset 'a' has batches of 3 queries, not a multiple of ray\.num_workers 2"):
        one(tmp_path, rows, workers=2, train={"global_batch_size": 6})


@pytest.mark.parametrize(
    ("name", "own", "whole", "expected"),
    [
        ("a", None, False, False),
        ("a", None, True, True),
        ("a", False, True, False),
        ("a", True, False, True),
        ("a-no_in_batch_neg", None, False, True),
        ("a-no_in_batch_neg", False, False, False),
        ("a-no_in_batch_neg/part.jsonl", None, False, True),
        ("top-no_in_batch_neg/middle/file", None, False, False),
        ("no_in_batch_neg_not", None, False, False),
    ],
)
def test_in_batch_negatives(tmp_path: Path, name: str, own: bool | None, whole: bool, expected: bool) -> None:
    found = one(
        tmp_path,
        plain(name, 4),
        train={"no_in_batch_neg": whole},
        same_dataset_within_batch=True,
        datasets=[{"name": "*", "no_in_batch_neg": own}],
    )
    assert found.no_in_batch_neg is expected


SCORED = {"type": "sts", "pos_scores": [0.5], "neg": []}


@pytest.mark.parametrize(
    ("more", "own", "expected"),
    [
        ({}, None, "symmetric_info_nce"),
        ({}, "info_nce", "info_nce"),
        (SCORED, None, "cosent"),
        (SCORED, "angle", "angle"),
        ({}, "angle", "type normal has the loss angle in data.datasets; allowed: a loss that compares passages"),
        (SCORED, "info_nce", "type sts has the loss info_nce in data.datasets; allowed: cosent or angle"),
    ],
)
def test_losses(tmp_path: Path, more: dict[str, object], own: str | None, expected: str) -> None:
    settings: dict[str, Any] = {
        "train": {"loss_type": "symmetric_info_nce"},
        "same_dataset_within_batch": True,
        "datasets": [{"name": "a", "loss": own}],
    }
    if " " not in expected:
        found = one(tmp_path, plain("a", 4, **more), **settings)
        assert found.loss == expected
        assert found.group_size == (1 if more else 3)
        return
    with pytest.raises(ValueError, match=expected):
        one(tmp_path, plain("a", 4, **more), **settings)


def test_labels_are_numbered_dataset_by_dataset_and_single_ones_are_left_out(tmp_path: Path) -> None:
    rows = [*labelled("a", "xyx"), *plain("r", 2), *labelled("b", "yyxxz"), *labelled("a", "yw")]
    found = read(tmp_path, rows)
    assert [(item.name, item.num_rows, item.left_out) for item in found.items] == [
        ("a", 4, 1),
        ("r", 2, 0),
        ("b", 4, 1),
    ]
    assert found.dataset_of_row.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, -1, 0, -1]
    labels = found.labels.tolist()
    assert labels[3:5] == [-1, -1]
    groups = {frozenset(i for i, other in enumerate(labels) if other == label) for label in set(labels) - {-1}}
    assert groups == {frozenset(rows) for rows in ([0, 2], [1, 10], [5, 6], [7, 8], [9], [11])}
    assert max(labels) == 5


@pytest.mark.parametrize("labels", ["xxx", "xxy", "xyz"])
def test_labels_that_leave_nothing_to_compare_are_refused(tmp_path: Path, labels: str) -> None:
    with pytest.raises(ValueError, match="dataset 'a' has fewer than two labels with two texts each"):
        read(tmp_path, [*labelled("a", labels), *labelled("b", "xxyy")])


def test_types_of_one_dataset_must_agree(tmp_path: Path) -> None:
    rows = [*plain("a", 6), *plain("a", 1, type="only_1neg")]
    with pytest.raises(ValueError, match="dataset 'a' has rows of the types normal, only_1neg; allowed: one type"):
        read(tmp_path, rows)


def test_a_group_of_scored_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset 'a' is of scored pairs, which have no negatives; remove its train"):
        read(tmp_path, plain("a", 4, **SCORED), datasets=[{"name": "a", "train_group_size": 2}])


def test_an_entry_of_no_dataset_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'medquod', which is no dataset.*they are 'nli', 'medquad'; did you mean 'medq"
    ):
        read(tmp_path, [*plain("nli", 4), *plain("medquad", 4)], datasets=[{"name": "medquod", "prompt": "p"}])
