"""A training worker that is killed in mid-epoch costs what came after the last checkpoint, and nothing else."""

import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rayembed.config import Experiment
from rayembed.jobs import train
from rayembed.jobs.folders import ChangedError
from tests.jobs.conftest import TRAIN, Command, MakeExperiment, StartCommand
from tests.jobs.toy_data import read_lines, write_rows
from tests.training.test_allocation import HUGE_PAGES

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS, BATCHES, SAVE = 60, 10, 6  # ten batches an epoch: few checkpoints lie between two epochs


@pytest.fixture(scope="module")
def unbroken(
    local_ray: None, make_experiment: MakeExperiment, beir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    """A run that nobody killed, with dropout."""
    folder = tmp_path_factory.mktemp("unbroken")
    rows = write_rows(beir, folder / "rows.jsonl")
    settings: dict[str, Any] = {**TRAIN, "global_batch_size": 8, "max_steps": STEPS, "save_steps": SAVE}
    experiment = make_experiment(folder / "run", data={"train": [str(rows)]}, train=settings)
    train.run(experiment)
    return experiment


def steps_done(output_dir: Path) -> int:
    path = output_dir / "train.partial" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def signal_the_worker(command: Command, output_dir: Path, step: int, number: int = signal.SIGKILL) -> None:
    """When the step is done, of this command's own descendants the one that trains."""
    deadline = time.monotonic() + 150
    while steps_done(output_dir) == 0:
        assert command.process.poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.02)
    (worker,) = [
        process
        for process in psutil.Process(command.process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline()[:1])
    ]
    while steps_done(output_dir) < step:
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.005)
    assert_in_huge_pages(worker.pid)
    worker.send_signal(number)


def assert_in_huge_pages(pid: int) -> None:
    """What `training.allocation.ONE_ARENA` asks for was there as the process started."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (pages,) = re.findall(r"AnonHugePages: +(\d+) kB", rollup)
    assert (int(pages) > 2**15) == ("[never]" not in HUGE_PAGES.read_text())


def assert_same_result(experiment: Experiment, unbroken: Experiment) -> None:
    out = Path(experiment.output_dir)
    lines = read_lines(out / "train" / "metrics.jsonl")
    expected = read_lines(Path(unbroken.output_dir) / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, Path(unbroken.output_dir)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_same_command_goes_on_after_a_kill(
    unbroken: Experiment, start_command: StartCommand, tmp_path: Path
) -> None:
    experiment = replace(unbroken, output_dir=str(tmp_path / "run"))
    command = start_command("train", experiment)
    signal_the_worker(command, tmp_path / "run", step=SAVE * 4 + 1)
    status, output = command.finish()
    assert status == 1
    assert "rayembed: error: training stopped" in output
    assert "run the same command again to go on" in output
    assert steps_done(tmp_path / "run") < STEPS, "killed before the end, or nothing is shown"
    assert not (tmp_path / "run" / "train").exists()

    assert experiment.train is not None
    with pytest.raises(ChangedError, match=r"train\.learning_rate: was 0\.001, is 0\.002"):
        train.run(replace(experiment, train=replace(experiment.train, learning_rate=2e-3)))

    status, output = start_command("train", experiment).finish()
    assert status == 0, output
    assert "resumed after step" in output
    assert_same_result(experiment, unbroken)


def test_with_max_failures_a_run_goes_on_by_itself_after_sigterm_and_sigkill(
    unbroken: Experiment, start_command: StartCommand, tmp_path: Path
) -> None:
    experiment = replace(unbroken, output_dir=str(tmp_path / "run"), ray=replace(unbroken.ray, max_failures=2))
    command = start_command("train", experiment)
    signal_the_worker(command, tmp_path / "run", SAVE * 2 + 1, signal.SIGTERM)
    deadline = time.monotonic() + 150
    while "resumed after step" not in command.log.read_text():
        assert command.process.poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.05)
    (step,) = re.findall(r"resumed after step (\d+)", command.log.read_text())
    assert int(step) > SAVE * 2, "a checkpoint of the step in which SIGTERM came, or a later one"
    signal_the_worker(command, tmp_path / "run", SAVE * 7 + 1)
    status, output = command.finish()
    assert status == 0, output
    assert output.count("resumed after step") == 2
    assert_same_result(experiment, unbroken)
