"""Waiting for the first worker at the end of training, which takes longer than a collective operation may."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from rayembed.data import mirror
from rayembed.data.copies import is_mirrored

EVERY_SECONDS = 0.2


class Turns:
    """Lets the other workers wait until the first one has done something by itself, however long it takes.

    A barrier fails after ray.timeout_s, and writing a model of many gigabytes takes longer; that the first worker died
    is seen by Ray Train, which stops the others.
    """

    def __init__(self, folder: Path, *, rank: int, device: torch.device) -> None:
        """All workers call it together.

        Args:
            folder: that all workers see.
            rank: of this worker.
            device: of this worker.
        """
        self._folder, self._rank = folder, rank
        self._begin = "turn" if is_mirrored(folder) else ".turn"  # a dot: of this machine alone
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._turn = 0
        drawn = torch.tensor(time.time_ns(), device=device)
        if not self._alone:
            dist.broadcast(drawn, src=0)  # files of an earlier try have other names
        self._name = int(drawn)

    def wait(self) -> None:
        """Ends the first worker's turn; the others come back when it has."""
        if self._alone:
            return
        self._turn += 1
        file = self._folder / f"{self._begin}-{self._name}-{self._turn}"
        if self._rank == 0:
            file.touch()
            mirror.send(file)
        while not mirror.is_there(file):
            time.sleep(EVERY_SECONDS)
        dist.barrier()
        if self._rank == 0:
            mirror.remove(file)
