"""What a training leaves on an object store: checkpoints by Ray; by worker 0, with each and at the end, the rest."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayembed.data import mirror
from rayembed.data.copies import as_here, is_mirrored, place_of, shown
from rayembed.models.trained import ADAPTER
from rayembed.tracking.metrics import EVALUATIONS

CHECKPOINTS = "checkpoints"
COPIES = "copies"  # of the driver, in what a worker is told
LOGS = ("metrics.jsonl", EVALUATIONS)  # that a run which goes on adds to
WAITS = (2.0, 10.0)  # seconds before a checkpoint is sent again


def storage(folder: Path) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints of a training in a folder, for its RunConfig."""
    place = place_of(folder)
    if place is None:
        return {"storage_path": str(folder.resolve())}
    return {"storage_filesystem": place[0], "storage_path": place[1]}


def received_settings(settings: dict[str, Any], *, rank: int) -> dict[str, Any]:
    """What a worker was told, with paths of this machine; models are here then, and what worker 0 goes on with."""
    copies = settings[COPIES]
    if not copies:
        return settings
    found: dict[str, Any] = as_here({key: value for key, value in settings.items() if key != COPIES}, copies)
    mirror.model_here(found)
    if rank == 0:
        mirror.tidy(Path(found["train_folder"]))
        mirror.all_here(Path(found["train_folder"]) / name for name in LOGS)
    return found


def sending_before(save: Callable[..., None], folder: Path, *, rank: int) -> Callable[..., None]:
    """`save`, before which worker 0 sends what the training has written so far.

    Figures of steps before a checkpoint are there then whenever it is, and those after it are dropped by who resumes.
    """
    if rank or not is_mirrored(folder):
        return save

    def send_and_save(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - of any checkpoint
        mirror.send_folder(folder, but=[CHECKPOINTS])
        save(*args, **kwargs)

    return send_and_save


def telling_after(tell: Callable[[dict[str, float]], None], folder: Path, *, rank: int) -> Callable[..., None]:
    """`tell`, before which worker 0 sends the figures of the evaluations.

    What is told may have a sweep end this process at once, and the sweep reads them in what was sent.
    """
    if rank or not is_mirrored(folder):
        return tell

    def send_and_tell(figures: dict[str, float], /) -> None:
        mirror.send(folder / EVALUATIONS)
        tell(figures)

    return send_and_tell


def leave(train_folder: Path, model_folder: Path, *, rank: int) -> None:
    """Sends what worker 0 has written by the end of the training."""
    if rank == 0 and is_mirrored(train_folder):
        if not model_folder.is_dir():
            raise FileNotFoundError(f"{shown(model_folder)} was removed on this machine before it was sent; run again")
        mirror.send_folder(train_folder, but=[CHECKPOINTS])
        for folder in (model_folder.with_name(ADAPTER), model_folder):
            if folder.is_dir():
                mirror.send_whole(folder)


def persisted(send: Callable[[], Any]) -> Any:  # noqa: ANN401 - a checkpoint of Ray
    """What `send` gives; on an object store it is tried again, because servers and networks fail for a moment."""
    for wait in WAITS:
        try:
            return send()
        except OSError:
            time.sleep(wait)
    return send()
