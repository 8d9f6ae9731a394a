"""Losses that pull a query's scores to a teacher's. Shapes: Q queries, P passages, G passages in a query's group.

All take the same arguments, so that KD_LOSSES is one table. A query's own group always takes part, whatever `allowed`
says: the teacher has judged it.
"""

import torch
from torch import Tensor

from rayembed.losses.contrastive import group_columns, group_scores, info_nce, taking_part


def kl_div(
    scores: Tensor,
    positives: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """InfoNCE over all passages plus the cross-entropy to the teacher's distribution inside the group.

    Args:
        scores: [Q, P] before the temperature.
        positives: [Q] int64, the column where each query's group of G passages begins.
        teacher: [Q, G] the teacher's scores, positive first.
        temperature: greater than 0; divides the scores.
        teacher_temperature: greater than 0; divides the teacher's scores.
        allowed: [Q, P] bool, False where a passage of another group is no negative. None: all are.

    Returns:
        Mean over queries, a float32 scalar in nats. The teacher's entropy is not subtracted.

    Source: FlagEmbedding 1.4.2, kd_loss_type kl_div.
    """
    group_size = teacher.shape[1]
    target = torch.softmax(teacher.float() / teacher_temperature, dim=-1)
    own = group_scores(scores, positives, group_size).float() / temperature
    distillation = -(target * torch.log_softmax(own, dim=-1)).sum(dim=-1).mean()
    if allowed is not None:
        allowed = allowed.scatter(1, group_columns(positives, group_size), True)
    return info_nce(scores, positives, temperature=temperature, allowed=allowed) + distillation


def m3_kd_loss(
    scores: Tensor,
    positives: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    allowed: Tensor | None = None,
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
        allowed: [Q, P] bool, False where a passage of another group is no negative. None: all are.

    Returns:
        Mean over queries, a float32 scalar in nats.

    Source: FlagEmbedding 1.4.2, kd_loss_type m3_kd_loss; BGE-M3, arXiv:2402.03216.
    """
    group = group_columns(positives, teacher.shape[1])
    target = torch.softmax(teacher.float() / teacher_temperature, dim=-1)
    logits = taking_part(scores.float() / temperature, allowed, group, own=True)
    total = logits.new_zeros(())
    for k in range(teacher.shape[1]):
        column = group[:, k : k + 1]
        own = logits.gather(1, column).squeeze(1)
        total = total + (target[:, k] * (torch.logsumexp(logits, dim=-1) - own)).mean()
        logits = logits.scatter(1, column, -torch.inf)  # the next passage does not compete with this one
    return total


def margin_mse(
    scores: Tensor,
    positives: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """Squared difference of two margins of the positive over each negative of its group: student's and teacher's.

    It replaces InfoNCE, and looks at no passage outside the group.

    Args:
        scores: [Q, P].
        positives: [Q] int64, the column where each query's group of G passages begins.
        teacher: [Q, G] the teacher's scores, positive first, of the same scale as `scores`.
        temperature: without effect; margins are those of the scores as they are.
        teacher_temperature: without effect.
        allowed: without effect.

    Returns:
        Mean over queries and their G - 1 negatives, a float32 scalar in squared units of the scores.

    Raises:
        ValueError: a group has no negative.

    Source: arXiv:2010.02666.
    """
    if teacher.shape[1] < 2:
        raise ValueError(
            "kd_loss_type margin_mse compares a positive with its negatives, and groups hold 1 passage; set "
            "data.train_group_size to 2 or more, or another train.kd_loss_type"
        )
    own, teacher = group_scores(scores, positives, teacher.shape[1]).float(), teacher.float()
    error = (own[:, :1] - own[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
    return error.square().mean()
