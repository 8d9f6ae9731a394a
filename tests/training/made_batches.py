"""Batches whose texts are numbers: vectors come from a small tower, keys say which texts are the same."""

import torch
from torch import Tensor

from rayembed.training.batches import Batch, Keys


def different_keys(num_queries: int, group_size: int) -> Keys:
    """Of texts of which no two are the same, on this worker; every row has one positive."""
    passages = torch.arange(num_queries * group_size) + 1
    return Keys(passages[::group_size] + 10**6, passages[::group_size].unsqueeze(1), passages)


def worker_batch(keys: Keys, teacher: Tensor | None, rank: int, world_size: int) -> Batch:
    """One worker's part of a global batch; without token ids, which no loss reads."""
    parts = (keys.queries, keys.positives, keys.passages)
    own = Keys(*(part.chunk(world_size)[rank] for part in parts))
    return Batch((), None if teacher is None else teacher.chunk(world_size)[rank], own)
