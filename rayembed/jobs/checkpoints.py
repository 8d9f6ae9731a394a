"""Checkpoints of a training worker: written beside the training, sent to the run folder while it goes on.

Ray sends them in a thread of its own and counts one when all workers have sent their part, so that a run that is killed
in between goes on from the one before. What Ray leaves to us: that no more than one is under way, that a worker that
stops by an exception waits for it, and which error says that it failed.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.collective
import torch.distributed as dist

from rayembed.config.train import TrainConfig
from rayembed.data import mirror
from rayembed.data.copies import shown
from rayembed.jobs.trained_copy import persisted

if TYPE_CHECKING:
    from rayembed.training.engine import Engine

logger = logging.getLogger(__name__)
LOSS = "loss"  # of a checkpoint: the mean over the steps since the one before it
SCORE = "score"  # of a checkpoint, where they are kept by the figures of evaluations
NOT_EVALUATED = -1.0
LATER = 1e-15  # off a score for each step: Ray keeps the last of equal ones, and the first is the best
PREFIX = "rayembed-checkpoint-"
LONGEST_S = 3600.0  # of sending one checkpoint; then the storage counts as gone
YOUNG_S = 60.0  # a folder may be there a moment before it is locked


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is kept."""


class Checkpoints:
    """What one worker saves; used as `with checkpoints.all_sent():` around the training."""

    def __init__(
        self, storage: Path, *, timeout_s: float, metric: str | None = None, resumed_from: str | None = None
    ) -> None:
        """Removes what killed workers of this machine left of theirs.

        Args:
            storage: where they are kept, for messages.
            timeout_s: seconds that a worker which stops waits for those of the others.
            metric: by which they are kept. None: by something else.
            resumed_from: name of the checkpoint that this run goes on with. None: of none.
        """
        self._storage, self._timeout_s, self._metric = shown(storage), timeout_s, metric
        self._step, self._name, self._told = 0, resumed_from, False
        self._error: CheckpointError | None = None
        self._sent = threading.Event()
        self._sent.set()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = -1
        _remove_left()

    def save(
        self, engine: "Engine", state: dict[str, Any], loss: float, figures: dict[str, float] | None = None
    ) -> None:
        """Writes a checkpoint, and goes on while it is sent; waits before for the one that was on its way.

        Args:
            engine: all workers call this at the same step.
            state: {"step": steps done}, and what else is to be found there.
            loss: the mean over the steps since the last checkpoint, or since the start of this worker.
            figures: of an evaluation of this step. None: it has none.

        Raises:
            CheckpointError: the disk is full, the storage does not answer, or a file could not be written; of this
                checkpoint, or of the one before it.
        """
        if not self._sent.is_set():
            logger.info("train: step %d waits until the checkpoint of step %d is sent", state["step"], self._step)
        self._wait(LONGEST_S)
        ray.train.collective.barrier()  # without torch's limit of time: others may still send theirs
        self._step = state["step"]
        try:
            self._folder = _folder()  # its own a worker: Ray brings them together
            self._lock = _locked(Path(self._folder.name))
            engine.save(Path(self._folder.name), state)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
            self._remove()
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise  # another worker is gone: gloo tells of it by a RuntimeError that names its own files
            raise self._failed(error) from error
        self._sent.clear()
        name = f"step-{self._step:08d}"
        if name == self._name:  # saved before its evaluation, as a machine was about to go
            name += "-evaluated"
        self._name = name
        try:
            ray.train.report(
                {"step": self._step, LOSS: loss, **self._score(figures), **(figures or {})},
                checkpoint=ray.train.Checkpoint.from_directory(self._folder.name),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=False,  # Ray would leave it where sending fails
                checkpoint_upload_fn=self._send,
            )
        except BaseException:
            self._sent.set()  # nobody will send it
            raise

    def _score(self, figures: dict[str, float] | None) -> dict[str, float]:
        if self._metric is None:
            return {}
        return {SCORE: NOT_EVALUATED if figures is None else figures[self._metric] - LATER * self._step}

    def tell(self, figures: dict[str, float]) -> None:
        """Tells Ray, and a sweep that runs this training, of an evaluation without a checkpoint.

        Args:
            figures: with `step`; all workers call this at the same step.
        """
        ray.train.report(figures)
        self._told = True

    @contextmanager
    def of_evaluation(self, step: int) -> Iterator[Path]:
        """The folder of the checkpoint that was made of the evaluation of a step; all workers open it.

        Raises:
            CheckpointError: it is not kept any more.
        """
        self._wait(LONGEST_S)
        reported = ray.train.get_all_reported_checkpoints(
            consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=self._timeout_s
        )
        found = [
            one.checkpoint
            for one in reported
            if one.metrics["step"] == step and one.metrics.get(SCORE, NOT_EVALUATED) != NOT_EVALUATED
        ]
        if not found:
            raise CheckpointError(
                f"the checkpoint of step {step}, the best evaluation's, is not in {self._storage}; run the same "
                "command again with train.load_best_model_at_end: false and --overwrite, or restore it"
            )
        with found[-1].as_directory() as folder:
            yield Path(folder)

    @contextmanager
    def all_sent(self) -> Iterator[None]:
        """Leaves the block when all checkpoints are counted, also by an exception.

        Ray itself ends a worker that raises without sending what it has, and the other workers with it.
        """
        try:
            yield
        except BaseException:
            try:
                self._counted(self._timeout_s)
            except Exception as error:  # what ended the training matters more
                logger.warning("train: %s", error)
            raise
        self._counted(LONGEST_S)

    def _counted(self, seconds: float) -> None:
        saved = self._step > 0 or self._told
        self._wait(seconds)
        if saved:  # by the process that starts the workers: until then the part of another one may be missing
            ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=self._timeout_s
            )

    def _wait(self, seconds: float) -> None:
        if not self._sent.wait(seconds):
            raise self._failed(TimeoutError(f"it is not sent after {seconds:,.0f} s"))
        self._remove()
        if self._error is not None:
            raise self._error

    def _send(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """In Ray's thread, whose errors end the run."""
        try:
            storage = ray.train.get_context().get_storage()
            there: ray.train.Checkpoint = persisted(lambda: storage.persist_current_checkpoint(checkpoint, name))
        except Exception as error:  # of any filesystem
            self._error = self._failed(error)
            raise self._error from error
        finally:
            self._remove()  # also of what failed: Ray is about to end this process
            self._sent.set()
        return there

    def _remove(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _failed(self, error: Exception) -> CheckpointError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return CheckpointError(
            f"the checkpoint of step {self._step} could not be written by way of {tempfile.gettempdir()} to "
            f"{self._storage}: {reason}; the one before it is whole. Make room there, or set TMPDIR or output_dir to a "
            "larger disk"
        )


def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)


def _locked(folder: Path) -> int:
    """A lock that ends with this process, however it ends; -1 where the filesystem knows none."""
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(place)
        return -1
    return place


def _remove_left() -> None:
    """What processes that are no more left here: they were killed while they wrote or sent."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            old = time.time() - folder.stat().st_mtime > YOUNG_S
            place = _locked(folder) if old else -1
        except OSError:  # of another user, or gone by now
            continue
        if place >= 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(place)


def remove_uncounted(folder: Path) -> None:
    """Removes what Ray does not count among a run's checkpoints: parts of some whose workers were killed.

    Args:
        folder: of the checkpoints; no worker is at work.
    """
    state = mirror.here(folder / "checkpoint_manager_snapshot.json")
    counted = set[str]()
    if state.is_file():
        found = json.loads(state.read_text())
        results = [*found["checkpoint_results"], *found["pending_training_results"], found["latest_checkpoint_result"]]
        counted = {result["checkpoint_dir_name"] for result in results if result is not None}
    for path in folder.glob("step-*"):
        if path.is_dir() and path.name not in counted:
            logger.info("train: %s is removed: not all workers had sent their part of it", shown(path))
            mirror.remove(path)


def kept(train: TrainConfig) -> ray.train.CheckpointConfig:
    """Which checkpoints Ray keeps; the last one always."""
    if train.keeps_by_metric:
        return ray.train.CheckpointConfig(
            num_to_keep=train.save_total_limit, checkpoint_score_attribute=SCORE, checkpoint_score_order="max"
        )
    if not train.save_best:
        return ray.train.CheckpointConfig(num_to_keep=train.save_total_limit)
    return ray.train.CheckpointConfig(
        num_to_keep=train.save_total_limit, checkpoint_score_attribute=LOSS, checkpoint_score_order="min"
    )


def best_in_words(result: ray.train.Result, train_folder: Path, metric: str | None = None) -> str:
    """Which of the checkpoints that were kept is the best.

    Args:
        result: of the training.
        train_folder: where they lie when the job is done.
        metric: by which they were kept. None: by the loss.
    """
    if metric is not None:
        return _best_by_metric(result, train_folder, metric)
    found = [(metrics[LOSS], checkpoint) for checkpoint, metrics in result.best_checkpoints or [] if LOSS in metrics]
    if not found:
        return "train: no checkpoint was due, so that none is the best; lower train.save_steps"
    loss, checkpoint = min(found, key=lambda one: one[0])
    folder = Path(train_folder) / "checkpoints" / Path(checkpoint.path).name
    return f"train: the best checkpoint has the mean loss {loss:.4f} since the one before it: {shown(folder)}"


def _best_by_metric(result: ray.train.Result, train_folder: Path, metric: str) -> str:
    found = [(one[metric], one[SCORE], kept) for kept, one in result.best_checkpoints or [] if metric in one]
    if not found:
        return "train: no evaluation was better than that of the base model, and none has a checkpoint"
    figure, _, checkpoint = max(found, key=lambda one: one[1])
    folder = Path(train_folder) / "checkpoints" / Path(checkpoint.path).name
    return f"train: the best checkpoint has the {metric} {figure:.4f} on the dev split: {shown(folder)}"
