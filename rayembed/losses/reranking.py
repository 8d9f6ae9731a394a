"""A loss of rerankers that judges each (query, passage) pair by itself; listwise are info_nce and kl_div on [Q, G]."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pointwise_bce(
    scores: Tensor,
    positives: Tensor,
    teacher: Tensor | None = None,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Binary cross-entropy of every pair: relevant or not, or as relevant as the teacher says.

    Args:
        scores: [Q, G] logits before the temperature.
        positives: [Q] int64, the column of each query's positive.
        teacher: [Q, G] logits, whose sigmoid replaces the labels 1 and 0. None: the positive is relevant, no other.
        temperature: greater than 0; divides the scores.
        teacher_temperature: greater than 0; divides the teacher's scores.

    Returns:
        Mean over all pairs, a float32 scalar in nats.

    Source: labels 1 and 0, arXiv:1901.04085.
    """
    if teacher is None:
        labels = torch.zeros_like(scores, dtype=torch.float32).scatter(1, positives.unsqueeze(1), 1.0)
    else:
        labels = torch.sigmoid(teacher.float() / teacher_temperature)
    return F.binary_cross_entropy_with_logits(scores.float() / temperature, labels)
