"""The loss of one worker's batch: which passages compete for each query, and which loss judges the scores."""

import torch
from torch import Tensor

from rayembed.config.train import TrainConfig
from rayembed.losses import KD_LOSSES, info_nce
from rayembed.training.gather import first_row, gather_with_grad


def contrastive_loss(
    queries: Tensor, passages: Tensor, teacher: Tensor | None, train: TrainConfig, *, group_size: int
) -> Tensor:
    """Mean loss over this worker's queries; the mean over workers is the loss of the global batch.

    Args:
        queries: [B, D] this worker's query vectors.
        passages: [B x G, D] its passage vectors, query by query, the positive first.
        teacher: [B, G] the teacher's scores; None: no distillation.
        train: temperature, negatives and distillation.
        group_size: G.
    """
    start = 0
    if train.no_in_batch_neg:
        groups = passages.view(len(queries), group_size, -1)
        scores = (queries.unsqueeze(1) * groups).sum(dim=-1)
        positives = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    else:
        if train.negatives_cross_device:
            start = first_row(len(queries))
            passages = gather_with_grad(passages)
        scores = queries @ passages.T
        positives = (torch.arange(len(queries), device=queries.device) + start) * group_size
    if teacher is None:
        return info_nce(scores, positives, temperature=train.temperature)
    return KD_LOSSES[train.kd_loss_type](
        scores, positives, teacher, temperature=train.temperature, teacher_temperature=train.teacher_temperature
    )


def negatives_per_query(train: TrainConfig, *, global_batch_size: int, num_workers: int, group_size: int) -> int:
    """Passages that compete with each query's positive."""
    if train.no_in_batch_neg:
        return group_size - 1
    queries = global_batch_size if train.negatives_cross_device else global_batch_size // num_workers
    return queries * group_size - 1
