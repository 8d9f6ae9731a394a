"""A command that looks at a run folder on a store leaves alone what another one of the same machine is writing."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.data import copies, mirror, storage
from rayembed.jobs import run_folder
from rayembed.jobs.run_folder import AtWorkError, beside_run_folder, in_run_folder
from tests.data.machines import URI, Machines


@pytest.fixture
def experiment() -> Experiment:
    return Experiment(output_dir=URI, model=ModelConfig(name_or_path="any"))


@contextmanager
def another_process_at_work(root: Path) -> Iterator[None]:
    """A lock is of an open file: this one is as good as another process's."""
    lock = copies.lock_of(root)
    assert lock is not None
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def written_on(machines: Machines) -> Path:
    """The copy of a training at work: figures and a model that were not sent yet."""
    root = machines.use("a")
    work = root / "train.partial"
    storage.write_atomic(work / "job.json", b"{}")
    (work / "metrics.jsonl").write_text("1\n")
    mirror.send_folder(work)
    (work / "metrics.jsonl").write_text("1\n2\n")
    (root / "model").mkdir()
    (root / "model" / "model.safetensors").write_text("weights")
    (root / ".locks").mkdir(exist_ok=True)
    copies.lock_of(root).parent.mkdir(exist_ok=True)  # type: ignore[union-attr]
    time.sleep(0.2)
    return root


def looked_at(experiment: Experiment) -> str:
    """What a plan finds of the figures."""
    return (Path(experiment.output_dir) / "train.partial" / "metrics.jsonl").read_text()


def test_a_look_changes_nothing_and_fetches_what_is_not_here(
    machines: Machines, written_on: Path, experiment: Experiment
) -> None:
    with machines.away("b"):
        storage.write_atomic(copies.local(URI) / "mine" / "job.json", b"{}")
    with another_process_at_work(written_on), machines.away("a"):
        assert beside_run_folder(looked_at)(experiment) == "1\n2\n"
        assert (written_on / "mine" / "job.json").exists()
    assert (written_on / "model" / "model.safetensors").exists()
    mirror.send_folder(written_on / "train.partial")
    assert machines.there()["train/metrics.jsonl"] == "1\n2\n"


def test_a_second_job_is_refused_and_begins_when_the_first_has_ended(
    machines: Machines, written_on: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "WAIT_S", 0.2)
    job: Callable[[Experiment], str] = in_run_folder(looked_at)
    with another_process_at_work(written_on), machines.away("a"):
        with pytest.raises(AtWorkError, match=r"works in s3://bucket/runs/one"):
            job(experiment)
        assert (written_on / "model" / "model.safetensors").exists()
    with machines.away("a"):
        assert job(experiment) == "1\n", "what was not sent by a command that ended is done again"
    with another_process_at_work(written_on):
        pass  # it was given back


def test_jobs_within_a_job_have_its_place(machines: Machines, written_on: Path, experiment: Experiment) -> None:
    @in_run_folder
    def outer(own: Experiment) -> str:
        found = in_run_folder(looked_at)(own)
        lock = copies.lock_of(Path(own.output_dir))
        assert lock is not None
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return found

    with machines.away("a"):
        assert outer(experiment) == "1\n"


def test_trials_in_a_run_folder_do_not_wait_for_its_command(
    machines: Machines, written_on: Path, experiment: Experiment
) -> None:
    storage.write_atomic(written_on / "tune" / "trials" / "one" / "train.partial" / "metrics.jsonl", b"own")
    trial = replace(experiment, output_dir=str(written_on / "tune" / "trials" / "one"))
    with another_process_at_work(written_on):
        assert in_run_folder(looked_at)(trial) == "own"
