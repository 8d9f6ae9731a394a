"""Real worker processes on gloo, each with one thread; what they return comes back to the test."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120.0


def in_workers(world_size: int, work: Callable[..., Any], *inputs: object) -> list[Any]:
    """What `work(*inputs)`, a function of a module, returns on each rank of a process group."""
    context = multiprocessing.get_context("forkserver")  # its children share one import of all that is slow
    context.set_forkserver_preload(["pandas", "transformers.models.bert.modeling_bert", "rayembed.training.loop"])
    with TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_one, args=(folder, rank, world_size, work, inputs)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes)
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        assert not errors, "\n".join(errors)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"workers ended with {codes} (None: later than {SECONDS} s)"
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes: Sequence[BaseProcess]) -> None:
    end = time.monotonic() + SECONDS
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):  # the others would wait for the one that failed
            break
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _one(folder: Path, rank: int, world_size: int, work: Callable[..., Any], inputs: tuple[object, ...]) -> None:
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
        torch.save(work(*inputs), folder / f"result-{rank}")
        dist.barrier()
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that used DeepSpeed and ends the long way
