"""Losses that pull a query's scores to a teacher's. Shapes: Q queries, P passages, G passages in a query's group."""

import torch
from torch import Tensor

from rayembed.losses.contrastive import group_scores, info_nce


def kl_div(
    scores: Tensor, positives: Tensor, teacher: Tensor, *, temperature: float, teacher_temperature: float = 1.0
) -> Tensor:
    """InfoNCE over all passages plus the cross-entropy to the teacher's distribution inside the group.

    Args:
        scores: [Q, P] before the temperature.
        positives: [Q] int64, the column where each query's group of G passages begins.
        teacher: [Q, G] the teacher's scores, positive first.
        temperature: greater than 0; divides the scores.
        teacher_temperature: greater than 0; divides the teacher's scores.

    Returns:
        Mean over queries, a float32 scalar in nats. The teacher's entropy is not subtracted.

    Source: FlagEmbedding 1.4.2, kd_loss_type kl_div.
    """
    target = torch.softmax(teacher.float() / teacher_temperature, dim=-1)
    own = group_scores(scores, positives, teacher.shape[1]).float() / temperature
    distillation = -(target * torch.log_softmax(own, dim=-1)).sum(dim=-1).mean()
    return info_nce(scores, positives, temperature=temperature) + distillation


def m3_kd_loss(
    scores: Tensor, positives: Tensor, teacher: Tensor, *, temperature: float, teacher_temperature: float = 1.0
) -> Tensor:
    """Each passage of the group as a positive in turn, weighted by the teacher, against all but its predecessors.

    It replaces InfoNCE: sum over k of teacher weight k times (logsumexp over all passages except the group's first k,
    minus the score of passage k).

    Args:
        scores: [Q, P] before the temperature.
        positives: [Q] int64, the column where each query's group of G passages begins.
        teacher: [Q, G] the teacher's scores, positive first.
        temperature: greater than 0; divides the scores.
        teacher_temperature: greater than 0; divides the teacher's scores.

    Returns:
        Mean over queries, a float32 scalar in nats.

    Source: FlagEmbedding 1.4.2, kd_loss_type m3_kd_loss; BGE-M3, arXiv:2402.03216.
    """
    target = torch.softmax(teacher.float() / teacher_temperature, dim=-1)
    logits = scores.float() / temperature
    total = logits.new_zeros(())
    for k in range(teacher.shape[1]):
        column = (positives + k).unsqueeze(1)
        own = logits.gather(1, column).squeeze(1)
        total = total + (target[:, k] * (torch.logsumexp(logits, dim=-1) - own)).mean()
        logits = logits.scatter(1, column, -torch.inf)  # the next passage does not compete with this one
    return total
