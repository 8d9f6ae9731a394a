"""Files that one process of those that see them holds at a time; the system gives them back when it ends."""

import fcntl
import logging
import time
from io import TextIOWrapper
from pathlib import Path

EVERY_S = 0.1
_HELD: dict[Path, TextIOWrapper] = {}
logger = logging.getLogger(__name__)


def take(file: Path, *, seconds: float | None = None, waiting: str = "") -> bool:
    """Takes a lock for this process, which may have it already; where the file system has no locks, all have it.

    Args:
        file: that is made where it is not there, and stays.
        seconds: that are waited at most. None: until it is free.
        waiting: what to say after a second of waiting.
    """
    if file in _HELD:
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    opened, began, told = file.open("w"), time.monotonic(), not waiting
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - began
            if seconds is not None and waited >= seconds:
                opened.close()
                return False
            if not told and waited > 1:
                logger.info(waiting)
                told = True
            time.sleep(EVERY_S)
            continue
        except OSError:  # there are none
            pass
        _HELD[file] = opened
        return True


def holds(file: Path) -> bool:
    """Whether this process has a lock."""
    return file in _HELD


def give_back(file: Path) -> None:
    """Gives a lock back; one that this process has not is left alone."""
    opened = _HELD.pop(file, None)
    if opened is not None:
        opened.close()
