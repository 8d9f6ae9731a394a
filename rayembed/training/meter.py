"""What happened since the last update of the weights, summed over workers by one small all-reduce."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from rayembed.training.batches import Batch


@dataclass(frozen=True)
class Reading:
    """Figures of one update, and what the workers know together; the same on all of them but for the seconds."""

    figures: dict[str, float]
    broken: list[int]
    """Places, among the batches of this update, of those whose loss is not finite."""

    flags: list[bool]
    """Whether any worker said so."""


class Meter:
    """Sums what happened since the last update of the weights."""

    def __init__(self, device: torch.device) -> None:
        """Starts the clock; `device` is where losses are."""
        self._device = device
        self._losses: list[torch.Tensor] = []
        self._counts = np.zeros(3)
        self._start = time.monotonic()

    def restart(self) -> None:
        """Begins the clock anew: what was between two steps is of neither."""
        self._start = time.monotonic()

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Takes this worker's part of a batch."""
        self._losses.append(loss.detach())
        self._counts += (
            batch.num_queries,
            sum(texts.num_tokens for texts in batch.inputs),
            sum(texts.num_slots for texts in batch.inputs),
        )

    def read(self, world_size: int, flags: Sequence[bool] = ()) -> Reading:
        """Ends a step on all workers; `flags` is what this one has to say to the others."""
        told = torch.from_numpy(np.concatenate([self._counts, np.asarray(flags, np.float64)]))
        sums = torch.cat([torch.stack(self._losses).double(), told.to(self._device)])
        if world_size > 1:
            dist.all_reduce(sums)
        number, values = len(self._losses), sums.tolist()  # the one moment that waits for the device
        losses, rest = [value / world_size for value in values[:number]], values[number:]
        queries, tokens, slots = rest[:3]
        seconds = time.monotonic() - self._start
        self._losses, self._counts, self._start = [], np.zeros(3), time.monotonic()
        figures = {
            "loss": sum(losses) / number,
            "seconds": seconds,
            "queries_per_second": queries / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / slots,
        }
        broken = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
        return Reading(figures, broken, [value > 0 for value in rest[3:]])
