"""Rows that cannot be trained on are refused before anything starts, and jobs read what the job before them wrote."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rayembed.config import Experiment
from rayembed.config.data import DataConfig, DatasetConfig
from rayembed.config.mine import MineConfig
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.jobs.inputs import check_rows, planned_rows, training_rows

Make = Callable[..., Experiment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def experiment(row: dict[str, object], *, count: int = 8, group: int = 2, **train: object) -> Experiment:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"query": f"q{i}", "pos": [f"p{i}"], **row}) + "\n" for i in range(count)))
        return Experiment(
            output_dir=str(tmp_path / "run"),
            model=ModelConfig(name_or_path="any"),
            data=DataConfig(train=[str(path)], train_group_size=group),
            train=TrainConfig(**{"per_device_train_batch_size": 4, **train}),  # type: ignore[arg-type]
        )

    return experiment


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({}, {}, "is 2, but the row of query 'q0' has no negatives; add a section mine"),
        ({"neg": ["n"]}, {"knowledge_distillation": True}, "the row of query 'q0' has no teacher scores"),
        ({"neg": ["n"]}, {"count": 3}, "3 training rows do not fill one batch of 4 queries"),
        ({}, {"group": 1, "no_in_batch_neg": True}, "leave no negative at all"),
        ({"neg": ["n"]}, {"deepspeed": "none.json"}, "no file 'none.json'"),
    ],
)
def test_refused_with_what_to_change(
    make: Make, row: dict[str, object], settings: dict[str, object], message: str
) -> None:
    experiment = make(row, **settings)
    with pytest.raises(ValueError, match=message):
        check_rows(experiment, training_rows(experiment, after=())[0])


def test_what_a_job_before_training_will_bring_is_not_asked_for(make: Make) -> None:
    experiment = make({}, knowledge_distillation=True)
    check_rows(experiment, training_rows(experiment, after=())[0], coming=("mine", "score"))


def test_group_size_1_needs_no_negatives(make: Make) -> None:
    experiment = make({}, group=1)
    check_rows(experiment, training_rows(experiment, after=())[0])


def test_the_latest_job_s_rows_are_read_and_its_absence_is_said(make: Make, tmp_path: Path) -> None:
    experiment = replace(make({}), mine=MineConfig())
    with pytest.raises(ValueError, match="run `rayembed mine` first"):
        training_rows(experiment, after=("score", "mine"))
    assert "(after mine)" in planned_rows(experiment, after=("score", "mine"))[1]
    folder = tmp_path / "run" / "mine"
    folder.mkdir(parents=True)
    (folder / "part-00000.jsonl").write_text('{"query": "mined", "pos": ["p"], "neg": ["n"]}\n')
    for reading in (training_rows, planned_rows):
        rows, source = reading(experiment, after=("score", "mine"))
        assert (rows.read_part(0).column("query").to_pylist(), source) == (["mined"], str(folder))


def test_a_dataset_s_own_group_size_says_whether_its_rows_need_negatives(make: Make) -> None:
    experiment = make({})
    rows, _ = training_rows(experiment, after=())
    with pytest.raises(ValueError, match="has no negatives"):
        check_rows(experiment, rows)
    own = replace(experiment.data, datasets=[DatasetConfig(name="*", train_group_size=1)])
    check_rows(replace(experiment, data=own), rows)
