"""As many workers as the cluster has room for: the same losses and weights, whatever their number, also in mid-run."""

import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayembed.config import Experiment
from rayembed.jobs import train
from rayembed.jobs.folders import LAYOUT, RECORD
from rayembed.jobs.inputs import training_rows
from rayembed.jobs.train_reads import training_reads
from tests.jobs.cluster import cluster
from tests.jobs.conftest import TRAIN, Command, MakeExperiment, StartCommand
from tests.jobs.test_train import largest_difference, weights
from tests.jobs.toy_data import read_lines, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
STEPS, SAVE = 200, 10


def losses(experiment: Experiment) -> list[float]:
    return [line["loss"] for line in read_lines(Path(experiment.output_dir) / "train" / "metrics.jsonl")]


def assert_same_result(experiment: Experiment, fixed: Experiment) -> None:
    assert losses(experiment) == pytest.approx(losses(fixed), abs=1e-4)
    ours, theirs = (weights(Path(run.output_dir) / "model") for run in (experiment, fixed))
    assert largest_difference(ours, theirs) < 2e-5


@pytest.fixture(scope="module")
def broken(trained: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, str]:
    """A run of one worker that ended when a checkpoint could not be sent, and what was said."""
    assert trained.train is not None
    experiment = replace(
        trained,
        output_dir=str(tmp_path_factory.mktemp("broken") / "run"),
        train=replace(trained.train, save_steps=2, save_total_limit=1, save_best=True),
    )
    folder = Path(experiment.output_dir) / "train.partial"
    (folder / "checkpoints").mkdir(parents=True)
    reads = training_reads(experiment, training_rows(experiment, after=())[0])
    (folder / RECORD).write_text(json.dumps({**reads, LAYOUT: []}))
    (folder / "checkpoints" / "step-00000006").write_text("a file where a folder should be")
    with pytest.raises(train.TrainingError) as error:
        train.run(experiment)
    return experiment, str(error.value)


def test_a_checkpoint_that_cannot_be_sent_ends_the_run_and_leaves_the_one_before(
    broken: tuple[Experiment, str],
) -> None:
    experiment, message = broken
    checkpoints = Path(experiment.output_dir) / "train.partial" / "checkpoints"
    assert (
        f"the checkpoint of step 6 could not be written by way of {tempfile.gettempdir()} to {checkpoints}: " in message
    )
    assert "the one before it is whole. Make room there" in message
    snapshot = json.loads((checkpoints / "checkpoint_manager_snapshot.json").read_text())
    assert snapshot["latest_checkpoint_result"]["checkpoint_dir_name"] == "step-00000004"
    assert list((checkpoints / "step-00000004" / "state").iterdir())


def test_it_goes_on_from_there_on_as_many_workers_as_have_room_and_names_the_best(
    broken: tuple[Experiment, str], trained: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    ray = replace(trained.ray, num_workers=(1, 2), cpus_per_worker=2, max_failures=1)  # 2 CPUs: room for one alone
    experiment = replace(broken[0], ray=ray)
    out = Path(experiment.output_dir)
    (out / "train.partial" / "checkpoints" / "step-00000006").unlink()
    with caplog.at_level("INFO", "rayembed"):
        train.run(experiment)
    assert_same_result(experiment, trained)
    found = losses(experiment)
    best, step = min((sum(found[step - 2 : step]) / 2, step) for step in (2, 4, 6, 8))
    where = out / "train" / "checkpoints" / f"step-{step:08d}"
    assert f"the best checkpoint has the mean loss {best:.4f} since the one before it: {where}" in caplog.text
    assert list((where / "state").iterdir())


def wait_for(command: Command, text: str, *, times: int = 1, within: float = 150) -> None:
    deadline = time.monotonic() + within
    while command.log.read_text().count(text) < times:
        assert command.process.poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.02)


def training(pid: int) -> list[psutil.Process]:
    """Of the processes of the nodes those that train."""
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline()[:1])]


def wait_for_checkpoint(command: Command, experiment: Experiment, step: int) -> None:
    folder = Path(experiment.output_dir) / "train.partial" / "checkpoints"
    while not any(int(path.name.removeprefix("step-")) >= step for path in folder.glob("step-*")):
        assert command.process.poll() is None, command.log.read_text()
        time.sleep(0.01)


@pytest.mark.timeout(600)
def test_a_node_goes_and_another_one_comes(
    local_ray: None,
    make_experiment: MakeExperiment,
    beir: Path,
    start_command: StartCommand,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    rows = write_rows(beir, tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {**TRAIN, "global_batch_size": 8, "max_steps": STEPS, "save_steps": SAVE}
    fixed = make_experiment(
        tmp_path / "fixed",
        data={"train": [str(rows)]},
        model={"dropout": 0.0},
        train={**settings, "learning_rate": 1e-4},
        export={"probe_texts": 8},
    )
    train.run(fixed)
    with cluster(2) as nodes:
        ray = {"num_workers": (1, 2), "max_failures": 3, "address": nodes.address, "resize_interval_s": 1}
        experiment = replace(fixed, output_dir=str(tmp_path / "run"), ray=replace(fixed.ray, **ray))
        command = start_command("train", experiment)
        wait_for(command, "queries on 2 workers")
        wait_for_checkpoint(command, experiment, 3 * SAVE)
        lost = time.monotonic()
        nodes.remove()
        wait_for(command, "queries on 1 worker,")
        record_property("seconds to go on with fewer", time.monotonic() - lost)
        (step,) = re.findall(r"resumed after step (\d+)", command.log.read_text())
        wait_for_checkpoint(command, experiment, int(step) + 2 * SAVE)
        (alone,) = training(nodes.pid)
        alone.suspend()  # or it is done before the other node is there
        joined = time.monotonic()
        nodes.add()
        time.sleep(5)
        alone.resume()
        wait_for(command, "queries on 2 workers", times=2)
        record_property("seconds to go on with more", time.monotonic() - joined)
        status, output = command.finish()
        assert status == 0, output
    assert "which was saved by 2 workers" in output
    assert "which was saved by 1 worker" in output
    assert_same_result(experiment, fixed)


@pytest.mark.timeout(600)
def test_a_worker_that_hangs_is_given_up_after_the_timeout(
    trained: Experiment, start_command: StartCommand, tmp_path: Path
) -> None:
    assert trained.train is not None
    experiment = replace(
        trained,
        output_dir=str(tmp_path / "run"),
        train=replace(trained.train, max_steps=STEPS, save_steps=SAVE),
        ray=replace(trained.ray, num_workers=2, max_failures=1, timeout_s=10),
    )
    command = start_command("train", experiment)
    wait_for_checkpoint(command, experiment, 4 * SAVE)  # so that one before it is counted
    hung = training(command.process.pid)[0]
    hung.suspend()
    try:
        wait_for(command, "resumed after step", within=300)  # 60 s where nothing else runs, 200 s at a load of 18
        status, output = command.finish()
    finally:
        if hung.is_running():
            hung.kill()
    assert status == 0, output
    assert len(losses(experiment)) == STEPS
