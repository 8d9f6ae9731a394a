"""Checkpoints are sent while training goes on, one at a time; none counts that is not whole, none is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.train import CheckpointConfig

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.jobs import checkpoints as module
from rayembed.jobs import train
from rayembed.jobs.checkpoints import (
    PREFIX,
    CheckpointError,
    Checkpoints,
    best_in_words,
    kept,
    remove_uncounted,
)
from rayembed.training.engine import Engine


class Written:
    """An engine that writes a file of this worker."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank

    def save(self, folder: Path, state: dict[str, int]) -> None:
        (folder / f"rank-{self._rank}").write_text(json.dumps(state))


ENGINE: Engine = Written()  # type: ignore[assignment]


class FakeRay:
    """Ray's side of one worker: sends in a thread, each time when it is let."""

    def __init__(self, storage: Path) -> None:
        self.storage, self.go = storage, threading.Event()
        self.reports: list[dict[str, Any]] = []
        self.asked: list[float] = []
        self.barriers: list[int] = []
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def report(self, metrics: dict[str, Any], **settings: Any) -> None:  # noqa: ANN401 - as Ray's
        self.reports.append(metrics)

        def send() -> None:
            self.go.wait(10)
            try:
                settings["checkpoint_upload_fn"](settings["checkpoint"], settings["checkpoint_dir_name"])
            except CheckpointError as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=send))
        self.threads[-1].start()

    def barrier(self) -> None:
        self.barriers.append(len(self.reports))

    def get_context(self) -> "FakeRay":
        return self

    def get_storage(self) -> "FakeRay":
        return self

    def persist_current_checkpoint(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        (self.storage / name).mkdir(parents=True)
        for path in Path(checkpoint.path).iterdir():
            (self.storage / name / path.name).write_bytes(path.read_bytes())
        return ray.train.Checkpoint(str(self.storage / name))

    def get_all_reported_checkpoints(self, *, consistency_mode: object, timeout_s: float) -> None:
        assert consistency_mode is ray.train.CheckpointConsistencyMode.COMMITTED
        self.asked.append(timeout_s)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay(tmp_path / "storage")
    for name in ("report", "get_context", "get_all_reported_checkpoints"):
        monkeypatch.setattr(ray.train, name, getattr(made, name))
    monkeypatch.setattr(ray.train.collective, "barrier", made.barrier)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return made


def on_disk(tmp_path: Path) -> int:
    return len(list((tmp_path / "temporary").iterdir()))


def test_training_goes_on_while_one_checkpoint_is_sent_and_the_next_one_waits(fake: FakeRay, tmp_path: Path) -> None:
    checkpoints = Checkpoints(fake.storage, timeout_s=7)
    checkpoints.save(ENGINE, {"step": 1}, 0.5)
    assert on_disk(tmp_path) == 1
    assert not fake.storage.exists(), "sent already"
    os.utime(next((tmp_path / "temporary").iterdir()), (0, 0))
    module._remove_left()
    assert on_disk(tmp_path) == 1, "it is held while it is sent"
    second = threading.Thread(target=checkpoints.save, args=(ENGINE, {"step": 2}, 0.25))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert on_disk(tmp_path) == 1
    fake.go.set()
    second.join(10)
    with checkpoints.all_sent():
        pass
    assert fake.reports == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert json.loads((fake.storage / "step-00000002" / "rank-0").read_text()) == {"step": 2}
    assert on_disk(tmp_path) == 0
    assert fake.asked == [7]
    assert fake.barriers == [0, 1], "workers wait for each other before they write: torch's own limit is short"


def test_a_worker_that_stops_by_an_error_waits_until_its_checkpoint_is_counted(fake: FakeRay, tmp_path: Path) -> None:
    checkpoints = Checkpoints(fake.storage, timeout_s=7)
    checkpoints.save(ENGINE, {"step": 2}, 0.5)
    threading.Timer(0.3, fake.go.set).start()
    with pytest.raises(FloatingPointError, match="of step 3"), checkpoints.all_sent():
        raise FloatingPointError("the loss of step 3")
    assert (fake.storage / "step-00000002" / "rank-0").exists()
    assert fake.asked == [7]


def test_a_worker_that_saved_nothing_asks_nobody(fake: FakeRay) -> None:
    with pytest.raises(ValueError, match="before"), Checkpoints(fake.storage, timeout_s=7).all_sent():
        raise ValueError("before")
    assert fake.asked == []


def test_what_cannot_be_sent_is_an_error_of_the_next_save_and_of_the_end(fake: FakeRay, tmp_path: Path) -> None:
    fake.storage.write_text("a file where a folder should be")
    fake.go.set()
    checkpoints = Checkpoints(fake.storage, timeout_s=7)
    checkpoints.save(ENGINE, {"step": 1}, 0.5)
    fake.threads[0].join()
    assert on_disk(tmp_path) == 0, "Ray is about to end the process"
    message = rf"step 1 could not be written by way of {tmp_path}/temporary to {fake.storage}: .*Not a directory.*; the"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(ENGINE, {"step": 2}, 0.5)
    with pytest.raises(CheckpointError, match=message), checkpoints.all_sent():
        pass
    with pytest.raises(FloatingPointError), checkpoints.all_sent():
        raise FloatingPointError("matters more")
    assert len(fake.reports) == 1
    assert [str(error) for error in fake.errors] == [str(checkpoints._error)], "Ray is told, and ends the run"
    assert on_disk(tmp_path) == 0


def test_an_upload_that_never_ends_is_an_error(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(fake.storage, timeout_s=0.1)
    checkpoints.save(ENGINE, {"step": 1}, 0.5)
    with pytest.raises(FloatingPointError), checkpoints.all_sent():
        raise FloatingPointError("is not held up for longer than the limit of collectives")
    monkeypatch.setattr(module, "LONGEST_S", 0.1)
    with pytest.raises(CheckpointError, match=r"step 1 could not be written .*: it is not sent after 0 s"):
        checkpoints.save(ENGINE, {"step": 2}, 0.5)
    fake.go.set()


def test_a_report_that_fails_holds_nobody_up(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(*_: object, **__: object) -> None:
        raise ConnectionError("the controller is gone")

    monkeypatch.setattr(ray.train, "report", report)
    checkpoints = Checkpoints(fake.storage, timeout_s=60)
    begun = time.monotonic()
    with pytest.raises(ConnectionError), checkpoints.all_sent():
        checkpoints.save(ENGINE, {"step": 1}, 0.5)
    assert time.monotonic() - begun < 5


def test_a_worker_that_is_gone_is_no_full_disk(fake: FakeRay, tmp_path: Path) -> None:
    class Alone:
        def save(self, _folder: Path, _state: dict[str, int]) -> None:
            raise dist.DistBackendError("connection closed by peer")

    engine: Engine = Alone()  # type: ignore[assignment]
    with pytest.raises(dist.DistBackendError):
        Checkpoints(fake.storage, timeout_s=7).save(engine, {"step": 1}, 0.5)
    assert on_disk(tmp_path) == 0


HOLDS = """
import sys, time
from pathlib import Path
from rayembed.jobs.checkpoints import _locked
place = _locked(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_what_killed_workers_left_is_removed_and_what_is_at_work_is_not(fake: FakeRay, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    names = {f"{PREFIX}left": False, f"{PREFIX}held": True, f"{PREFIX}new": True, "other": True}
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").touch()
        if not name.endswith("new"):
            os.utime(folder / name, (0, 0))
    worker = subprocess.Popen([sys.executable, "-c", HOLDS, folder / f"{PREFIX}held"], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    Checkpoints(fake.storage, timeout_s=7)
    assert {name: (folder / name).exists() for name in names} == names
    worker.kill()
    worker.wait()
    Checkpoints(fake.storage, timeout_s=7)
    assert not (folder / f"{PREFIX}held").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"zero_optimization": {"stage": 2, "parameter_alignment": 8}}, "parameter_alignment"),
        ({"zero_optimization": {"stage": 1}}, None),
    ],
)
def test_elastic_training_refuses_checkpoints_of_one_number_of_workers(
    settings: dict[str, Any], named: str | None
) -> None:
    experiment = Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none"),
        train=TrainConfig(global_batch_size=2, deepspeed=settings),
        ray=RayConfig(num_workers=(1, 2), max_failures=1),
    )
    if named is None:
        train._check_engine(experiment)
        return
    with pytest.raises(ValueError, match=rf"{named}, .* 1 to 2 workers; remove it"):
        train._check_engine(experiment)


def test_parts_of_checkpoints_that_do_not_count_are_removed(tmp_path: Path) -> None:
    names = [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").touch()  # no checkpoint

    def result(name: str) -> dict[str, Any]:
        return {"version": 0, "checkpoint_dir_name": name, "metrics": {}}

    state = {
        "checkpoint_results": [result(names[0])],
        "latest_checkpoint_result": result(names[1]),
        "pending_training_results": [result(names[2])],
    }
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(state))
    remove_uncounted(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [*names[:3], "step-00000010"]
    (tmp_path / "checkpoint_manager_snapshot.json").unlink()
    remove_uncounted(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000010"]
    remove_uncounted(tmp_path / "not there")


@pytest.mark.parametrize(("save_best", "expected"), [(False, (None, None)), (True, ("loss", "min"))])
def test_ray_is_told_which_to_keep(save_best: bool, expected: tuple[str, str]) -> None:
    found: CheckpointConfig = kept(TrainConfig(save_total_limit=3, save_best=save_best))
    assert found.num_to_keep == 3
    if save_best:
        assert (found.checkpoint_score_attribute, found.checkpoint_score_order) == expected
    else:
        assert found.checkpoint_score_attribute is None


def test_the_best_is_named_where_it_will_lie(tmp_path: Path) -> None:
    losses = {2: 0.75, 4: 0.25, 6: 0.5}
    found = [(ray.train.Checkpoint(f"/x/step-{step}"), {"step": step, "loss": loss}) for step, loss in losses.items()]
    result = ray.train.Result(metrics=None, checkpoint=None, error=None, path="", best_checkpoints=found)
    assert best_in_words(result, tmp_path / "train").endswith(
        f"the mean loss 0.2500 since the one before it: {tmp_path}/train/checkpoints/step-4"
    )
    none = ray.train.Result(metrics=None, checkpoint=None, error=None, path="", best_checkpoints=[])
    assert "no checkpoint was due" in best_in_words(none, tmp_path)


class Slow(Checkpoints):
    """The last one of worker 1 takes its time, cannot be sent, or is cut off with its worker."""

    def __init__(self, storage: Path, how: str, rank: int) -> None:
        super().__init__(storage, timeout_s=60)
        self._how, self._rank = how, rank

    def _send(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        if name == "step-00000003" and self._rank == 1:
            time.sleep(2)
            if self._how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._how == "broken":
                shutil.rmtree(checkpoint.path)
        return super()._send(checkpoint, name)


def three_checkpoints(settings: dict[str, str]) -> None:
    """In a worker: the last one is on its way when the training ends."""
    rank = ray.train.get_context().get_world_rank()
    checkpoints, engine = Slow(Path(settings["storage"]), settings["how"], rank), Written(rank)
    with checkpoints.all_sent():
        for step, loss in LOSSES.items():
            checkpoints.save(engine, {"step": step}, loss)  # type: ignore[arg-type]
        if settings["how"] in ("raises", "killed"):
            raise FloatingPointError("the loss of step 4")


LOSSES = {1: 0.5, 2: 0.25, 3: 1.0}
ENDS = {  # how it ends, what it says, and which are kept: the best one and the last one
    "well": (None, [2, 3]),
    "raises": ("the loss of step 4", [2, 3]),
    "killed": ("died", [2]),
    "broken": ("the checkpoint of step 3 could not be written by way of", [2]),
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("how", ENDS)
def test_what_ray_counts(tmp_path: Path, how: str) -> None:
    message, expected = ENDS[how]
    trainer = ray.train.torch.TorchTrainer(
        three_checkpoints,
        train_loop_config={"storage": str(tmp_path), "how": how},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(tmp_path),
            checkpoint_config=kept(TrainConfig(save_best=True, save_total_limit=1)),
        ),
    )
    if message is None:
        assert best_in_words(trainer.fit(), tmp_path).endswith("step-00000002")
    else:
        with pytest.raises(ray.train.TrainingFailedError, match=message):
            trainer.fit()
    snapshot = json.loads((tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    assert sorted(found["metrics"]["step"] for found in snapshot["checkpoint_results"]) == expected
    assert snapshot["latest_checkpoint_result"]["metrics"]["step"] == expected[-1]
    for step in expected:
        assert {path.name for path in (tmp_path / "checkpoints" / f"step-{step:08d}").iterdir()} >= {"rank-0", "rank-1"}
