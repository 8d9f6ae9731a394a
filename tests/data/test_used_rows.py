"""Small datasets left out or put together, and prompts of datasets, in the rows that are used."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rayembed.config import Experiment
from rayembed.config.data import DataConfig, DatasetConfig
from rayembed.config.model import ModelConfig
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.used_rows import Small, entry_of, names_of

ENTRIES = [
    DatasetConfig(name="a*", batch_size=4),
    DatasetConfig(name="*b", batch_size=8, prompt="p"),
    DatasetConfig(name="*", prompt="rest", weight=2),
]


@pytest.mark.parametrize(
    ("dataset", "batch_size", "prompt"), [("ab", 4, "p"), ("b", 8, "p"), ("a", 4, "rest"), ("A", None, "rest")]
)
def test_the_first_entry_with_a_value_gives_it(dataset: str, batch_size: int | None, prompt: str) -> None:
    assert entry_of(ENTRIES, dataset, "batch_size") == batch_size
    assert entry_of(ENTRIES, dataset, "prompt") == prompt
    assert entry_of(ENTRIES[:2], "x", "prompt") is None


@pytest.mark.parametrize(
    ("threshold", "drop", "expected"),
    [
        (0, 0, {"one": "one", "a": "a", "b": "b", "c": "c", "d": "d"}),
        (3, 0, {"one": None, "a": "f/(small)", "b": "f/(small)", "c": "c", "d": "g/(small)"}),
        (3, 3, {"one": None, "a": "f/(small)", "b": "f/(small)", "c": "c", "d": None}),
        (3, 4, {"one": None, "a": None, "b": None, "c": "c", "d": None}),
    ],
)
def test_small_datasets_of_a_folder_are_put_together(
    threshold: int, drop: int, expected: dict[str, str | None]
) -> None:
    counts = {"one": 2, "a": 1, "b": 2, "c": 3, "d": 2}
    folders = {"a": "f", "b": "f", "c": "f", "d": "g"}
    assert names_of(counts, Small(folders, threshold, drop)) == expected


def write(tmp_path: Path, **files: int) -> None:
    for name, number in files.items():
        path = tmp_path / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"query": f"{name} {i}", "pos": ["p"]}) + "\n" for i in range(number)))


def prepared(tmp_path: Path, train: list[str], **data: object) -> Prepared:
    config = TypeAdapter(DataConfig).validate_python({"train": [str(tmp_path / name) for name in train]} | data)
    run = Experiment(output_dir=str(tmp_path / "run"), model=ModelConfig(name_or_path="none"), data=config)
    return prepare(run)


def rows(found: Prepared) -> list[dict[str, Any]]:
    assert found.rows is not None
    return [row for part in found.rows.iter_parts() for row in part.to_pylist()]


def test_small_datasets_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, alone=2, many__a=1, many__b=2, many__c=4, few__d=1)
    found = prepared(tmp_path, ["alone.jsonl", "many", "few"], small_threshold=3, drop_threshold=2)
    found.report.raise_if_errors()
    assert [row["dataset"] for row in rows(found)] == ["many/(small)"] * 3 + ["c"] * 4
    assert found.report.counts["rows of small datasets, left out"] == 3
    assert [str(p) for p in found.report.warnings.kept["small datasets, left out"]] == [
        "alone: data.small_threshold: 2 rows, too few; left out",
        "d: data.drop_threshold: 1 row, too few; left out",
    ]


def test_the_threshold_is_about_the_rows_that_are_drawn(tmp_path: Path) -> None:
    write(tmp_path, alone=9, other=4)
    found = prepared(tmp_path, ["alone.jsonl", "other.jsonl"], small_threshold=3, max_example_num_per_dataset=2)
    assert next(found.report.errors.lines()) == (
        "data.train: data.small_threshold: leaves no dataset; lower it, or set it to 0"
    )


def test_a_dataset_gives_its_prompt_to_rows_without_one(tmp_path: Path) -> None:
    write(tmp_path, a=2, b=1)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"query": "own", "pos": ["p"], "prompt": "row"}\n')
    sources = ["a.jsonl", "b.jsonl"]
    found = prepared(tmp_path, sources, datasets=[{"name": "a", "prompt": "dataset"}])
    assert [row["prompt"] for row in rows(found)] == ["dataset", "dataset", "row", None]
    again = prepared(tmp_path, sources, datasets=[{"name": "*", "prompt": "other"}])
    assert [row["prompt"] for row in rows(again)] == ["other", "other", "row", "other"]
