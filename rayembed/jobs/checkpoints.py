"""Checkpoints of a training worker: written beside the training, sent to the run folder while it goes on.

Ray sends them in a thread of its own and counts one when all workers have sent their part, so that a run that is killed
in between goes on from the one before. What Ray leaves to us: that no more than one is under way, that a worker that
stops by an exception waits for it, and which error says that it failed.
"""

import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray.train

from rayembed.config.train import TrainConfig

if TYPE_CHECKING:
    from rayembed.training.engine import Engine

logger = logging.getLogger(__name__)
LOSS = "loss"  # of a checkpoint: the mean over the steps since the one before it
PREFIX = "rayembed-checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is kept."""


class Checkpoints:
    """What one worker saves; used as `with checkpoints.all_sent():` around the training."""

    def __init__(self, storage: Path, *, timeout_s: float) -> None:
        """Removes what killed workers of this machine left of theirs.

        Args:
            storage: where they are kept, for messages.
            timeout_s: seconds that a worker which stops waits for those of the others.
        """
        self._storage, self._timeout_s = storage, timeout_s
        self._step = 0
        self._error: CheckpointError | None = None
        self._sent = threading.Event()
        self._sent.set()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        _remove_left()

    def save(self, engine: "Engine", state: dict[str, int], loss: float) -> None:
        """Writes a checkpoint, and goes on while it is sent; waits before for the one that was on its way.

        Args:
            engine: all workers call this at the same step.
            state: {"step": steps done}
            loss: the mean over the steps since the last checkpoint, or since the start of this worker.

        Raises:
            CheckpointError: the disk is full, the storage does not answer, or a file could not be written; of this
                checkpoint, or of the one before it.
        """
        self._wait()
        self._step = state["step"]
        try:
            self._folder = tempfile.TemporaryDirectory(prefix=_prefix())  # its own a worker: Ray brings them together
            engine.save(Path(self._folder.name), state)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
            self._remove()
            raise self._failed(error) from error
        self._sent.clear()
        ray.train.report(
            {"step": self._step, LOSS: loss},
            checkpoint=ray.train.Checkpoint.from_directory(self._folder.name),
            checkpoint_dir_name=f"step-{self._step:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # Ray would leave it where sending fails
            checkpoint_upload_fn=self._send,
        )

    @contextmanager
    def all_sent(self) -> Iterator[None]:
        """Leaves the block when all checkpoints are counted, also by an exception.

        Ray itself ends a worker that raises without sending what it has, and the other workers with it.
        """
        try:
            yield
        except BaseException:
            try:
                self._counted()
            except CheckpointError as error:  # what ended the training matters more
                logger.warning("train: %s", error)
            raise
        self._counted()

    def _counted(self) -> None:
        saved = self._step > 0
        self._wait()
        if saved:  # by the process that starts the workers: until then the part of another one may be missing
            ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=self._timeout_s
            )

    def _wait(self) -> None:
        self._sent.wait()
        self._remove()
        if self._error is not None:
            raise self._error

    def _send(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """In Ray's thread, whose errors end the run."""
        try:
            storage = ray.train.get_context().get_storage()
            there: ray.train.Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            self._remove()
        except Exception as error:  # of any filesystem
            self._error = self._failed(error)
            raise self._error from error
        finally:
            self._sent.set()
        return there

    def _remove(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _failed(self, error: Exception) -> CheckpointError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return CheckpointError(
            f"the checkpoint of step {self._step} could not be written by way of {tempfile.gettempdir()} to "
            f"{self._storage}: {reason}; the one before it is whole. Make room there, or set TMPDIR or output_dir to a "
            "larger disk"
        )


def _prefix(process: int | None = None) -> str:
    """Names the machine too: other machines may share the folder, and their processes have numbers of their own."""
    return f"{PREFIX}-{socket.gethostname()}-{process or os.getpid()}-"


def _remove_left() -> None:
    """Of processes of this machine that are no more: they were killed while they wrote or sent."""
    machine = _prefix().removesuffix(f"{os.getpid()}-")
    for folder in Path(tempfile.gettempdir()).glob(f"{machine}*-*"):
        process = folder.name.removeprefix(machine).partition("-")[0]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def kept(train: TrainConfig) -> ray.train.CheckpointConfig:
    """Which checkpoints Ray keeps; the last one always."""
    if not train.save_best:
        return ray.train.CheckpointConfig(num_to_keep=train.save_total_limit)
    return ray.train.CheckpointConfig(
        num_to_keep=train.save_total_limit, checkpoint_score_attribute=LOSS, checkpoint_score_order="min"
    )


def best_in_words(result: ray.train.Result, train_folder: Path) -> str:
    """Which of the checkpoints that were kept has the lowest loss.

    Args:
        result: of the training.
        train_folder: where they lie when the job is done.
    """
    found = [(metrics[LOSS], checkpoint) for checkpoint, metrics in result.best_checkpoints or [] if LOSS in metrics]
    if not found:
        return "train: no checkpoint was due, so that none is the best; lower train.save_steps"
    loss, checkpoint = min(found, key=lambda one: one[0])
    folder = Path(train_folder) / "checkpoints" / Path(checkpoint.path).name
    return f"train: the best checkpoint has the mean loss {loss:.4f} since the one before it: {folder}"
