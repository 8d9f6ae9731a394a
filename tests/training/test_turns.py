"""Workers wait for the first one longer than a barrier would."""

import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from rayembed.training.turns import Turns
from tests.training.processes import in_workers

TURN = 4.0  # seconds; a barrier of these workers fails after 2


def test_the_others_come_back_when_the_first_has_done_its_part(tmp_path: Path) -> None:
    found = in_workers(2, _wait, tmp_path)
    assert [len(own) for own in found] == [2, 2]
    for first, other in zip(*found, strict=True):
        assert other >= first - 0.1, "not before the first one"
    assert not list(tmp_path.glob(".turn-*"))


def test_alone_nobody_waits(tmp_path: Path) -> None:
    Turns(tmp_path / "not there", rank=0, device=torch.device("cpu")).wait()


def _wait(folder: Path) -> list[float]:
    rank = dist.get_rank()
    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    turns, ended = Turns(folder, rank=rank, device=torch.device("cpu")), []
    for seconds in (TURN, 0.0):
        if rank == 0:
            time.sleep(seconds)
            ended.append(time.time())
        turns.wait()
        if rank:
            ended.append(time.time())
    return ended
