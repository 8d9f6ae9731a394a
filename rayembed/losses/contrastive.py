"""Contrastive losses over a score matrix. Shapes: Q queries, P passages, G passages in a query's own group."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores: Tensor, positives: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of each query's positive against every other passage.

    Args:
        scores: [Q, P] before the temperature; higher means more relevant.
        positives: [Q] int64, the column of each query's positive passage.
        temperature: greater than 0; divides the scores.

    Returns:
        Mean over queries, a float32 scalar in nats. Equal scores give log(P).

    Raises:
        ValueError: `positives` does not hold one column per query.

    Source: InfoNCE, arXiv:1807.03748; in-batch negatives, arXiv:2004.04906.
    """
    if positives.shape != scores.shape[:1]:
        raise ValueError(f"positives has shape {tuple(positives.shape)}; scores {tuple(scores.shape)} need one per row")
    return F.cross_entropy(scores.float() / temperature, positives)


def group_scores(scores: Tensor, positives: Tensor, group_size: int) -> Tensor:
    """The scores of each query's own group: [Q, G] out of [Q, P], the positive first.

    Args:
        scores: [Q, P].
        positives: [Q] int64, the column where each query's group begins.
        group_size: G.
    """
    columns = positives.unsqueeze(1) + torch.arange(group_size, device=scores.device)
    return scores.gather(1, columns)
