"""How many tokens a chunk of GradCache holds: tried on this machine, before the first step.

A chunk of longer texts costs more memory in attention, so that the longest texts there are make it up.
"""

import json
import logging
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayembed.models.chunks import TokenBatch
from rayembed.models.encoding import autocast
from rayembed.training.batches import BatchSource

FILE = "tokens_per_chunk.json"
SMALLEST, LARGEST = 1024, 2**20
LEFT_FREE = 0.2
WORTH = 1.03  # a chunk twice as large has to be faster by this, or it is not worth its memory
BYTES_A_WEIGHT = 16  # to come, of a trained one: gradient, two moments, and ZeRO's flat copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What a chunk of one size took."""

    tokens: int
    seconds: float
    """Of forward and backward pass, the mean over workers."""

    bytes: int
    """Of memory at its peak, beyond what was held before; the most of any worker."""


def probed_tokens(
    source: BatchSource, model: nn.Module, *, dtype: torch.dtype, device: torch.device, folder: Path
) -> int:
    """Tokens a chunk for this model and machine; the same on all workers, and in a run that goes on.

    Args:
        source: of the texts; packs or pads them.
        model: on the device, not yet in an engine; its gradients are dropped.
        dtype: of the arithmetic.
        device: of this worker.
        folder: where the number is kept, for all workers.
    """
    file = folder / FILE
    if file.exists():
        found: int = json.loads(file.read_text())["tokens_per_chunk"]
        return found
    trained = sum(own.numel() for own in model.parameters() if own.requires_grad)
    budget = (1 - LEFT_FREE) * _free_bytes(device) - BYTES_A_WEIGHT * trained
    unlimited = replace(source, sub_batch_size=None, tokens_per_chunk=None)
    longest = len(source.longest_text()[0])

    def measured(tokens: int) -> tuple[float, int]:
        return _pass(model, unlimited.copies_of_longest(max(1, tokens // longest)).to(device), dtype, device)

    chosen, trials = choose(measured, first=max(SMALLEST, longest), budget=budget)
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("train: %s", _sentence(chosen, trials, longest))
        made = {"tokens_per_chunk": chosen, "tokens_of_longest_text": longest, "tried": [asdict(one) for one in trials]}
        folder.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".writing")
        beside.write_text(json.dumps(made, indent=1))
        os.replace(beside, file)
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
        except torch.OutOfMemoryError:
            seconds, memory = 0.0, 2**62
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
    try:
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
    finally:
        model.zero_grad(set_to_none=True)
    return seconds, _peak_bytes(device) - held


def _held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_bytes(device: torch.device) -> float:
    """Memory that this worker may take."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 1024 * available / (dist.get_world_size() if dist.is_initialized() else 1)


def _sentence(chosen: int, trials: list[Trial], longest: int) -> str:
    tried = ", ".join(
        f"{one.tokens:,} ({one.tokens / one.seconds:,.0f} tokens/s, {one.bytes / 2**20:,.0f} MiB)"
        if one.seconds
        else f"{one.tokens:,} (no room)"
        for one in trials
    )
    return f"chunks of {chosen:,} tokens; tried on texts of {longest} tokens: {tried}"
