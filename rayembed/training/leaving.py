"""SIGTERM asks a worker to leave: it does so at the end of its step, with a checkpoint."""

import os
import signal
import threading
from types import FrameType

_ASKED = threading.Event()


class LeftError(RuntimeError):
    """A worker was asked to leave, and did after a checkpoint."""


def watch_sigterm() -> None:
    """From now on the first SIGTERM only asks this process; a second one does what it did before.

    Called in the process's main thread, while training may run in another one.
    """
    before = signal.getsignal(signal.SIGTERM)

    def ask(_number: int, _frame: FrameType | None) -> None:
        if _ASKED.is_set():
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)
        _ASKED.set()

    _ASKED.clear()
    signal.signal(signal.SIGTERM, ask)


def asked_to_leave() -> bool:
    """Whether a SIGTERM came since `watch_sigterm`."""
    return _ASKED.is_set()
