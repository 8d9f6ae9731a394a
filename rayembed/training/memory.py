"""Memory of a worker: what there is, and what training will hold."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayembed.config.train import TrainConfig

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float:
    """What a worker may take: of its GPU, or its share of the machine's or container's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    workers = dist.get_world_size() if dist.is_initialized() else 1  # as if all were on this machine
    return min(free, container_bytes(CGROUP)) / workers


def container_bytes(folder: Path) -> float:
    """What a container's limit leaves, by the files of its control group; infinite where it has none."""
    before = "memory/memory"  # of version 1
    for most, used in (("memory.max", "memory.current"), (f"{before}.limit_in_bytes", f"{before}.usage_in_bytes")):
        if (folder / most).is_file() and (limit := (folder / most).read_text().strip()) != "max":
            return float(int(limit) - int((folder / used).read_text()))
    return float("inf")


def optimizer_bytes(trained: int, train: TrainConfig, zero: dict[str, Any], workers: int) -> float:
    """Moments and ZeRO's copy of the weights, on one worker.

    Args:
        trained: weights.
        train: its field optim.
        zero: section zero_optimization of DeepSpeed's settings.
        workers: that share, from stage 1 on.
    """
    moments = 2 if train.optim == "adamw_bnb_8bit" else 8
    if zero["stage"] == 0:
        return float(moments * trained)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return 0.0
    return (moments + 4) * trained / workers
