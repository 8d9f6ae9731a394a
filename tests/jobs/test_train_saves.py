"""Checkpoints that cannot be written, and folders of other numbers of workers: what is said, and what is kept."""

import json
import re
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.train
import ray.train.collective
import torch
from torch import nn

from rayembed.config import Experiment
from rayembed.config.train import TrainConfig
from rayembed.jobs import train
from rayembed.jobs.checkpoints import CheckpointError, Checkpoints
from rayembed.jobs.folders import RECORD, ChangedError
from rayembed.jobs.inputs import training_rows
from rayembed.jobs.train_reads import training_reads
from tests.jobs.conftest import MakeExperiment
from tests.training.processes import in_workers
from tests.training.test_engine import experiment as settings_of
from tests.training.test_engine import make_engine


def save_on_a_full_disk(storage: Path) -> tuple[str, list[int]]:
    """A checkpoint, and one that finds no room for the files it writes; what is said, and what was reported."""
    reported: list[int] = []
    checkpoints = Checkpoints(storage, timeout_s=10)

    def report(metrics: dict[str, Any], **_: object) -> None:
        reported.append(metrics["step"])
        checkpoints._sent.set()

    ray.train.report = report
    ray.train.collective.barrier = lambda: None
    engine = make_engine(settings_of(Path("unused"), 1, 1), nn.Linear(200, 200))
    engine.backward(engine(torch.ones(1, 200)).sum())
    engine.step()
    checkpoints.save(engine, {"step": 1}, 0.5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(engine, {"step": 2}, 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error.value), reported


def test_a_checkpoint_that_finds_no_room_is_not_reported(tmp_path: Path) -> None:
    message, reported = in_workers(1, save_on_a_full_disk, tmp_path)[0]
    assert reported == [1]
    assert f"the checkpoint of step 2 could not be written by way of {tempfile.gettempdir()} to {tmp_path}: " in message
    assert "the one before it is whole. Make room there, or set TMPDIR or output_dir to a larger disk" in message


def begun(made: Experiment, **settings: Any) -> Experiment:  # noqa: ANN401 - of section train
    """Left by a run that was killed, on one worker."""
    made = replace(made, train=TrainConfig(**settings), data=replace(made.data, train_group_size=1))
    rows, _ = training_rows(made, after=())
    folder = Path(made.output_dir) / "train.partial"
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps(training_reads(made, rows)))
    return made


def on_two(made: Experiment) -> Experiment:
    return replace(made, ray=replace(made.ray, num_workers=2))


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of workers that training was started on."""
    started: list[int] = []
    monkeypatch.setattr(train, "tokenize_rows", lambda *_: None)

    def fit(experiment: Experiment, *_: object) -> None:
        started.append(experiment.ray.most_workers)

    monkeypatch.setattr(train, "_fit", fit)
    monkeypatch.setattr(train, "ray_session", lambda _: open("/dev/null"))
    return started


def test_the_same_batches_on_other_workers_go_on(
    make_experiment: MakeExperiment, tmp_path: Path, no_fit: list[int]
) -> None:
    train.run(on_two(begun(make_experiment(tmp_path / "run"), global_batch_size=8)))
    assert no_fit == [2]


def test_other_batches_are_refused_with_the_size_to_set(
    make_experiment: MakeExperiment, tmp_path: Path, no_fit: list[int]
) -> None:
    made = on_two(begun(make_experiment(tmp_path / "run"), per_device_train_batch_size=8))
    with pytest.raises(ChangedError, match=r"(?s)was 8, is 16.*keep the batches: set train\.global_batch_size to 8$"):
        train.run(made)
    assert made.train is not None
    train.run(replace(made, train=replace(made.train, global_batch_size=8)))
    assert no_fit == [2]


def test_a_dry_run_says_the_range(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    made = make_experiment(tmp_path / "run", ray={"num_workers": [1, 2], "max_failures": 1})
    made = replace(made, train=TrainConfig(global_batch_size=8), data=replace(made.data, train_group_size=1))
    assert re.search(r" 8 queries an epoch on 1 to 2 workers, .* and [\d.]+ to [\d.]+ GB a worker at", train.plan(made))


CASES: list[tuple[dict[str, Any], list[Any]]] = [
    ({"negatives_cross_device": False, "global_batch_size": 8}, []),
    ({"per_device_train_batch_size": 8}, [{"name": "*", "batch_size": 4}]),
]


@pytest.mark.parametrize(("settings", "datasets"), CASES)
def test_where_workers_change_what_is_learned_they_are_refused(
    make_experiment: MakeExperiment, tmp_path: Path, no_fit: list[int], settings: dict[str, Any], datasets: list[Any]
) -> None:
    made = make_experiment(tmp_path / "run", data={"datasets": datasets})
    other = on_two(begun(made, **settings))
    assert other.train is not None
    other = replace(other, train=replace(other.train, global_batch_size=None, per_device_train_batch_size=4))
    with pytest.raises(
        ChangedError, match=r"(?s)num_workers: was 1, is 2.*goes on with another ray\.num_workers where"
    ):
        train.run(other)
    assert no_fit == []
