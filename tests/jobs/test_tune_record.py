"""A sweep goes on from its record only where its old trials can be compared with new ones."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from rayembed.config import Experiment
from rayembed.config.trials import baseline
from rayembed.data.store import Store
from rayembed.jobs import mine, tune_sweep
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.tune_prepare import prepare_shared, prepare_trial
from rayembed.jobs.tune_trials import Trial, begin, known_trials
from tests.jobs.conftest import MakeExperiment
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.without_ray import do_units_here


@pytest.fixture
def data(beir: Path, tmp_path: Path) -> Path:
    return with_dev_split(beir, tmp_path / "toy")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A DeepSpeed file."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    return file


def with_other_judgements(data: Path, folder: Path) -> Path:
    """A copy in which fewer queries are judged."""
    shutil.copytree(data, folder)
    lines = (folder / "qrels" / "dev.tsv").read_text().splitlines()
    (folder / "qrels" / "dev.tsv").write_text("\n".join(lines[:4]) + "\n")
    return folder


def begun(experiment: Experiment) -> Experiment:
    """The same, whose sweep has begun."""
    tune_sweep._claim(experiment, Path(experiment.output_dir) / "tune", overwrite=False)
    return experiment


def changed(now: Experiment) -> str:
    """What a sweep says that is gone on with."""
    return "\n".join(tune_sweep._changes(now, Path(now.output_dir) / "tune"))


def test_figures_of_another_dev_split_are_not_compared(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path
) -> None:
    first = begun(replace(make_sweep(make_experiment, tmp_path / "run", data), mine=None))
    other = with_other_judgements(data, tmp_path / "other")
    assert "judgements" in changed(replace(first, data=replace(first.data, evaluation=str(other))))
    moved = shutil.copytree(data, tmp_path / "moved")
    assert changed(replace(first, data=replace(first.data, evaluation=str(moved)))) == ""
    shutil.copy(other / "qrels" / "dev.tsv", data / "qrels" / "dev.tsv")
    assert "judgements" in changed(first)


@pytest.mark.parametrize(
    ("train", "says"),
    [({"negatives_cross_device": False}, "num_workers: was 1, is 2"), ({"global_batch_size": 16}, "")],
    ids=["other negatives", "the same batches"],
)
def test_the_number_of_workers_counts_where_it_changes_the_batches(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, train: dict[str, Any], says: str
) -> None:
    one, two = (
        replace(make_sweep(make_experiment, tmp_path / "run", data, train=train, ray={"num_workers": n}), mine=None)
        for n in (1, 2)
    )
    if "global_batch_size" in train:
        one, two = (replace(own, train=replace(own.train, per_device_train_batch_size=8)) for own in (one, two))  # type: ignore[type-var]
    begun(one)
    found = changed(two)
    assert says in found
    assert bool(says) == bool(found)


def test_the_contents_of_a_deepspeed_file_count_and_its_name_does_not(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, engine: Path
) -> None:
    def of(file: Path) -> Experiment:
        return replace(make_sweep(make_experiment, tmp_path / "run", data, train={"deepspeed": str(file)}), mine=None)

    begun(of(engine))
    assert changed(of(Path(shutil.copy(engine, tmp_path / "renamed.json")))) == ""
    engine.write_text(json.dumps({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}))
    assert "deepspeed.bf16.enabled: was absent, is True" in changed(of(engine))


def test_the_experiment_as_it_is_does_not_take_rows_that_were_mined_with_other_settings(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_units_here(monkeypatch)
    mine.run(make_sweep(make_experiment, tmp_path / "run", data))
    settings = {"negative_number": 3, "range_for_sampling": "2-30"}
    space = {"mine.negative_number": {"choice": [2, 3]}}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"space": space}, mine=settings)
    with pytest.raises(ChangedError):
        mine.run(experiment)
    prepare_shared(experiment)
    folder, trial = tmp_path / "run" / "tune", Trial(0, baseline(experiment), baseline=True)
    begin(folder, trial)
    ready = prepare_trial(experiment, folder, trial)
    negatives = Store.open(ready.rows).read_part(0, ["neg"]).column("neg").to_pylist()
    assert {len(own) for own in negatives} == {3}


@pytest.mark.parametrize(
    ("error", "again"),
    [(ValueError("no"), False), (ChangedError("set it back"), True), (RuntimeError("lost"), True)],
)
def test_a_trial_that_cannot_start_is_tried_again_unless_its_settings_are_refused(
    make_experiment: MakeExperiment,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    again: bool,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tune_sweep, "prepare_trial", fail)
    experiment, folder = replace(make_sweep(make_experiment, tmp_path / "run", data), mine=None), tmp_path / "run/tune"
    assert tune_sweep.Course(experiment, folder).choose() is None
    failures = [trial.result.failure for trial in known_trials(folder) if trial.result is not None]
    assert [failure.again for failure in failures if failure is not None] == [again] * 3


def test_no_file_of_a_sweep_has_the_keys_of_a_uri_that_an_error_tells(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://AKIAKEY:SECRET@bucket/vec tors.npy?region=x"
    monkeypatch.setattr(tune_sweep, "prepare_trial", lambda *_: fs.FileSystem.from_uri(uri))
    experiment = replace(make_sweep(make_experiment, tmp_path / "run", data), mine=None)
    assert tune_sweep.Course(experiment, tmp_path / "run" / "tune").choose() is None
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(b"vec tors.npy" in path.read_bytes() for path in written)
    assert not [path for path in written if b"SECRET" in path.read_bytes() or b"AKIAKEY" in path.read_bytes()]
