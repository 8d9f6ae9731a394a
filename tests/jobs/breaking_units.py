"""Workers for the tests of `run_units` that die, fail or count, as their units say."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import ray


class Breaking:
    """Writes a line for every call to calls/NAME, then does what the unit's `does` says."""

    def __init__(self, *, constructor: str, threads: int, use_gpu: bool) -> None:
        if constructor == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if constructor:
            raise OSError(constructor)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        calls = folder / "calls" / name
        calls.parent.mkdir(exist_ok=True)
        with calls.open("a") as file:
            file.write(f"{os.getpid()}\n")
        first = len(calls.read_text().splitlines()) == 1
        if spec["does"] == "die" or (spec["does"] == "die once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if spec["does"] == "hang once" and first:  # until somebody kills it
            time.sleep(120)
        if spec["does"] == "ray.kill once" and first:  # no restart, says Ray: this actor is gone for good
            ray.kill(ray.get_runtime_context().current_actor)
            time.sleep(120)
        if spec["does"] == "sleep":
            time.sleep(1.2)
        if spec["does"] == "raise":
            raise ValueError(f"unit {name} holds nonsense")
        (folder / f"{name}.txt").write_text(spec["writes"])
        return {"letters": len(spec["writes"])}
