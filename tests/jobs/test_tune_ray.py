"""Sweeps on a real Ray: trials beside each other, one that is stopped, one that is killed."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from rayembed.config import Experiment
from rayembed.config.loading import load
from rayembed.jobs import tune
from rayembed.jobs.tune_trials import Trial, known_trials
from tests.jobs.conftest import Command, MakeExperiment, StartCommand
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.toy_data import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dev_split(beir, tmp_path_factory.mktemp("data") / "toy")


def wait_until_free(*, within: float = 30) -> None:
    """Fails where placement groups of ended or stopped trials are still there after a while."""
    deadline = time.monotonic() + within
    while left := [
        group for group in ray.util.placement_group_table().values() if group["state"] not in ("REMOVED", "PENDING")
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def best_of_log(folder: Path, trial: Trial) -> float:
    lines = read_lines(folder / "trials" / trial.name / "train" / "evaluations.jsonl")
    return max(float(line["eval"]["ndcg@10"]) for line in lines if line["step"])


def test_two_trials_beside_each_other_then_nothing_is_left_of_them(
    local_ray: None, make_experiment: MakeExperiment, data: Path, tmp_path: Path
) -> None:
    experiment = make_sweep(
        make_experiment, tmp_path / "run", data, tune={"num_samples": 2}, train={"eval_steps": 2, "max_steps": 4}
    )
    folder = tune.run(experiment)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["done", "done"]
    assert [row["steps"] for row in rows] == [4, 4]
    trials = known_trials(folder)
    for row, trial in zip(rows, trials, strict=True):
        assert trial.result is not None
        assert [step for step, _ in trial.result.evaluations] == [0, 2, 4]
        assert row["ndcg@10"] == best_of_log(folder, trial) == trial.result.best[1]  # type: ignore[index]
    best = load(str(folder / "best.yaml"))
    assert best.train is not None
    winner = max(rows, key=lambda row: row["ndcg@10"])
    assert best.train.temperature == winner["train.temperature"]
    assert not list(folder.glob("trials/*/mine"))
    assert not list(folder.glob("trials/*/model"))
    assert not (folder / ".ray").exists()
    wait_until_free()


def test_a_trial_that_does_badly_is_stopped_and_gives_its_place_back(
    local_ray: None, make_experiment: MakeExperiment, data: Path, tmp_path: Path
) -> None:
    """The rates of 10 and 12 ruin the model, so that its first evaluation is below those of useful rates."""
    tried: dict[str, Any] = {
        "space": {"train.learning_rate": {"choice": [2e-3, 10.0, 12.0]}},
        **{"search": "grid", "num_samples": None, "scheduler": "asha", "reduction_factor": 2, "max_concurrent": 1},
    }
    experiment = make_sweep(
        make_experiment, tmp_path / "run", data, tune=tried, train={"eval_steps": 20, "max_steps": 400}
    )
    folder = tune.run(experiment)
    found = {trial.values["train.learning_rate"]: trial.result for trial in known_trials(folder)}
    assert all(own is not None and own.failure is None for own in found.values())
    ended = {rate: own.status for rate, own in found.items() if own is not None and rate != 2e-3}  # may do either
    assert ended == {1e-3: "done", 10.0: "stopped early", 12.0: "stopped early"}
    assert all(own is not None and own.evaluations[-1][0] < 400 for rate, own in found.items() if rate > 1)
    wait_until_free()


def worker_of(command: Command) -> psutil.Process | None:
    """Of this command's own descendants one that trains."""
    for process in psutil.Process(command.process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()[:1]):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def wait_for(command: Command, what: Any) -> None:  # noqa: ANN401 - a question
    deadline = time.monotonic() + 400
    while not what():
        assert command.process.poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.02)


def steps_of(folder: Path) -> int:
    paths = list(folder.glob("trials/*/train.partial/metrics.jsonl"))
    return max((path.read_text().count("\n") for path in paths), default=0)


@pytest.fixture(scope="module")
def interrupted(
    make_experiment: MakeExperiment, data: Path, start_command: StartCommand, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, str]:
    """Its second trial lost a worker; in its third the command itself was killed, and begun again."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    settings: dict[str, Any] = {"eval_steps": 20, "max_steps": 60, "save_steps": 5, "per_device_train_batch_size": 4}
    settings["global_batch_size"] = 4
    experiment = make_sweep(make_experiment, out, data, tune={"max_concurrent": 1}, train=settings)
    command, folder = start_command("tune", experiment), out / "tune"
    wait_for(command, lambda: len(list(folder.glob("trials/*/result.json"))) == 1)
    wait_for(command, lambda: steps_of(folder) > 11)
    worker = worker_of(command)
    assert worker is not None
    worker.kill()
    wait_for(command, lambda: len(list(folder.glob("trials/*/result.json"))) == 2)
    wait_for(command, lambda: steps_of(folder) > 11)
    below = psutil.Process(command.process.pid).children(recursive=True)
    os.kill(command.process.pid, signal.SIGKILL)
    psutil.wait_procs(below, timeout=60)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    assert len(before) == 2
    again = start_command("tune", experiment)
    status, output = again.finish()
    assert status == 0, output
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was finished stays
    return experiment, output


def test_a_sweep_whose_worker_and_whose_command_were_killed_ends_as_one_that_was_not(
    interrupted: tuple[Experiment, str], local_ray: None, tmp_path: Path
) -> None:
    experiment, output = interrupted
    assert "resumed after step" in output
    folder = tune.run(replace(experiment, output_dir=str(tmp_path / "run")))
    ours = known_trials(Path(experiment.output_dir) / "tune")
    theirs = known_trials(folder)
    assert [trial.values for trial in ours] == [trial.values for trial in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert own.result is not None
        assert other.result is not None
        assert (own.result.status, own.result.evaluations) == (other.result.status, other.result.evaluations)
    first = json.loads((Path(experiment.output_dir) / "tune" / "sweep.json").read_text())
    assert [row["status"] for row in first["trials"]] == ["done"] * 3
