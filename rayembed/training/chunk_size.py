"""How many tokens a chunk of GradCache holds: tried on this machine, before the first step.

A chunk of longer texts costs more memory in attention, so that the longest texts there are make it up.
"""

import json
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayembed.data import mirror
from rayembed.data.storage import write_atomic
from rayembed.models.chunks import TokenBatch
from rayembed.models.encoding import autocast
from rayembed.training.allocation import give_back_freed_memory
from rayembed.training.batches import BatchSource
from rayembed.training.gather import largest_of_workers
from rayembed.training.memory import free_bytes

FILE = "tokens_per_chunk.json"
SMALLEST, LARGEST = 1024, 2**20
LEFT_FREE = 0.2
WORTH = 1.03  # a chunk twice as large has to be faster by this, or it is not worth its memory
NO_ROOM = 2**62

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What a chunk of one size took."""

    tokens: int
    seconds: float
    """Of forward and backward pass, the mean over workers."""

    bytes: int
    """Of memory at its peak, beyond what was held before; the most of any worker. NO_ROOM: it did not fit."""


def probed_tokens(
    source: BatchSource,
    model: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    coming_bytes: float,
) -> int:
    """Tokens a chunk for this model and machine; the same on all workers, and in a run that goes on on as many.

    Args:
        source: of the texts; packs or pads them.
        model: on the device, not yet in an engine; its gradients are dropped.
        dtype: of the arithmetic.
        device: of this worker.
        folder: where the number is kept, for all workers.
        coming_bytes: memory that training will hold beside a chunk and the gradients, on this worker.
    """
    here = {"workers": dist.get_world_size() if dist.is_initialized() else 1, "device": _name(device)}
    known = largest_of_workers(_known(folder / FILE, here), device)  # some may not see a file that others see
    if known:
        return known
    trained = [own for own in model.parameters() if own.requires_grad]
    budget = (1 - LEFT_FREE) * free_bytes(device) - coming_bytes - sum(4 * own.numel() for own in trained)
    longest = len(source.longest_text()[0])
    unlimited = replace(source, sub_batch_size=None, tokens_per_chunk=None)
    for own in trained:
        own.grad = torch.zeros_like(own)  # they are no part of what a chunk takes

    def measured(tokens: int) -> tuple[float, int]:
        return _pass(model, unlimited.copies_of_longest(tokens // longest).to(device), dtype, device)

    chosen, trials = choose(measured, first=longest * -(-SMALLEST // longest), budget=budget)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("train: %s", _sentence(chosen, trials, longest, budget))
        made = {"tokens_per_chunk": chosen, **here, "tokens_of_longest_text": longest, "tried": [*map(asdict, trials)]}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, json.dumps(made, indent=1).encode())
    return chosen


def choose(measured: Callable[[int], tuple[float, int]], *, first: int, budget: float) -> tuple[int, list[Trial]]:
    """The smallest size that is as fast as any within the budget; all workers call it, and get the same.

    Args:
        measured: tries a number of tokens; seconds, and bytes of memory.
        first: the smallest size; it is taken even where it is beyond the budget, as nothing smaller helps.
        budget: bytes there are for a chunk.
    """
    trials, tokens = list[Trial](), first
    while True:
        try:
            seconds, memory = measured(tokens)
        except RuntimeError as error:  # of torch's allocator, or of a library of the GPU that allocates by itself
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
            seconds, memory = 0.0, NO_ROOM
        seconds, memory, least = _of_all(seconds, memory, budget)
        before = trials[-1] if trials else None
        trials.append(Trial(tokens, seconds, memory))
        if memory > least:
            return (tokens if before is None else before.tokens), trials
        if before is not None and seconds / tokens * WORTH > before.seconds / before.tokens:
            return before.tokens, trials
        if 2 * memory > least or 2 * tokens > LARGEST:  # a CPU has no error to catch where memory ends
            return tokens, trials
        tokens *= 2


def _known(file: Path, here: dict[str, Any]) -> int:
    """The number of a file that was written on as many workers of this kind; else 0."""
    if not mirror.here(file).exists():
        return 0
    found = json.loads(file.read_text())
    return int(found["tokens_per_chunk"]) if all(found.get(key) == value for key, value in here.items()) else 0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _of_all(seconds: float, memory: int, budget: float) -> tuple[float, int, float]:
    """Mean seconds, most memory and least budget of the workers."""
    if not dist.is_initialized():
        return seconds, memory, budget
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (seconds, memory, budget))
    of_seconds, of_memory, of_budget = zip(*everyones, strict=True)
    return sum(of_seconds) / len(of_seconds), max(of_memory), min(of_budget)


def _pass(model: nn.Module, texts: TokenBatch, dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """Seconds of the faster of two passes forward and backward, and the memory of both."""
    held, seconds = _held_bytes(device), float("inf")
    for _ in range(2):
        start = time.perf_counter()
        with autocast(dtype, device):
            outputs = model([texts])[0]
        sides = [outputs] if isinstance(outputs, Tensor) else [*outputs.values()]
        total = torch.stack([side.float().sum() for side in sides if side.requires_grad]).sum()
        total.backward()  # type: ignore[no-untyped-call] # torch types no backward
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, _peak_bytes(device) - held


def _held_bytes(device: torch.device) -> int:
    """What is held now; the peak is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_freed_memory()  # what the size before left would count as held
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins anew
    except OSError:  # where that is forbidden, growth over the peak so far is what is seen
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return _peak_bytes(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _sentence(chosen: int, trials: list[Trial], longest: int, budget: float) -> str:
    tried = ", ".join(
        f"{one.tokens:,} (no room)"
        if one.bytes == NO_ROOM
        else f"{one.tokens:,} ({one.tokens / one.seconds:,.0f} tokens/s, {one.bytes / 2**20:,.0f} MiB)"
        for one in trials
    )
    room = f"{max(budget, 0) / 2**20:,.0f} MiB of room"
    return f"chunks of {chosen:,} tokens; tried on texts of {longest} tokens with {room}: {tried}"
