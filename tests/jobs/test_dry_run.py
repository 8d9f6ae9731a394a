"""A dry run refuses what the job itself would refuse, in the same words and with the same exit status."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from rayembed import cli
from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.data.mirror import remove
from rayembed.jobs import mine, run, train
from rayembed.jobs.folders import ChangedError
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.without_ray import do_units_here

CHANGED = "train.learning_rate=0.002"


@pytest.fixture
def made(make_experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment that was mined and, but for the training itself, trained."""
    do_units_here(monkeypatch)
    monkeypatch.setattr(train, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(train, "tokenize_rows", lambda *_: None)
    monkeypatch.setattr(train, "_fit", lambda *_: (tmp_path / "run" / "model").mkdir())
    experiment = make_experiment(
        tmp_path / "run", mine={"range_for_sampling": "2-20", "negative_number": 4}, train=TRAIN
    )
    mine.run(experiment)
    train.run(experiment)
    (tmp_path / "e.yaml").write_text(dump(experiment))
    return experiment


def ended(capsys: pytest.CaptureFixture[str], folder: Path, job: str, *words: str) -> tuple[int, str, str]:
    """Exit status, what was printed, and the error, of a command line on the experiment's file."""
    status = cli.main([job, str(folder / "e.yaml"), *words])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_other_settings_end_a_dry_run_as_they_end_the_job(
    made: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(capsys, tmp_path, "run", "--dry-run")[0] == 0
    told = [ended(capsys, tmp_path, *words) for words in (("train", CHANGED), ("train", CHANGED, "--dry-run"))]
    assert told[0] == told[1]
    assert told[0][0] == 1
    assert "train.learning_rate: was 0.001, is 0.002\nUse --overwrite" in told[0][2]
    status, _, error = ended(capsys, tmp_path, "run", CHANGED, "--dry-run")
    assert status == 1
    assert "train: cannot be done: " in error
    assert "train.learning_rate: was 0.001, is 0.002\nUse --overwrite" in error
    assert "mine: 80 queries against" in error, "the other plans are told too"
    for job in ("train", "run"):
        status, plan, _ = ended(capsys, tmp_path, job, CHANGED, "--dry-run", "--overwrite")
        assert status == 0
        assert plan.endswith("; was made from other settings and would be replaced\n")


def test_rows_that_are_mined_anew_are_no_change_as_long_as_they_are_not_there(made: Experiment, tmp_path: Path) -> None:
    remove(tmp_path / "run" / "mine")
    assert run.plan(made).endswith("; is up to date if its rows stay as they were")
    assert made.train is not None
    with pytest.raises(ValueError, match=r"(?s)this run would fail\n.*train\.learning_rate: was") as refused:
        run.plan(replace(made, train=replace(made.train, learning_rate=2e-3)))
    assert "rows: was" not in str(refused.value)
    mine.run(made)
    assert run.plan(made).endswith("; is up to date")


def test_another_number_of_rounds_is_refused(made: Experiment) -> None:
    assert made.mine is not None
    other = replace(made, mine=replace(made.mine, rounds=2))
    with pytest.raises(ChangedError, match=r"was made in 1 round, and mine\.rounds is 2"):
        run.plan(other)
    assert "rounds: 2 times mine to evaluate" in run.plan(other, overwrite=True)


def test_on_other_workers_the_advice_is_that_of_the_job(made: Experiment) -> None:
    assert made.train is not None
    other = replace(made, train=replace(made.train, global_batch_size=8))
    with pytest.raises(ChangedError, match=r"keep the batches: set train\.global_batch_size to 16"):
        train.plan(other)
