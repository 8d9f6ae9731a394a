"""BGE-M3's loss: three heads and their sum, and the sum as a teacher of the three (arXiv:2402.03216)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def m3_loss(
    head_scores: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    temperature: float,
    sparse_score_weight: float,
    sparse_loss_weight: float,
    self_distill: bool,
    allowed: Tensor | None = None,
    dense_loss: Tensor | None = None,
) -> Tensor:
    """A quarter of: dense + sum of the heads + sparse_loss_weight x sparse + ColBERT, and self-distillation.

    With it the loss is the mean of that and a third of: dense + sparse_loss_weight x sparse + ColBERT, each the
    cross-entropy to the softmax of the sum. The sum is dense + sparse_score_weight x sparse + ColBERT.

    Args:
        head_scores: dense, sparse and colbert, each [Q, P] before the temperature; dense alone: its loss is all.
        loss: what judges one such matrix, the temperature included.
        temperature: greater than 0; divides the scores that are distilled.
        sparse_score_weight: of the sparse scores in the sum.
        sparse_loss_weight: of the sparse head's losses.
        self_distill: whether the sum teaches the heads; no gradient goes through it then.
        allowed: [Q, P] bool, False where a passage takes no part in the distillation; every row has some. None: all do.
        dense_loss: in the place of loss(dense), such as its mean over Matryoshka's lengths. None: loss(dense).

    Returns:
        Mean over queries, a float32 scalar.

    Source: FlagEmbedding 1.4.2, whose weights are 0.3 and 0.1. Its sum is wrong with no_in_batch_neg (issue 1410); here
    [Q, G] scores are judged as any others.
    """
    dense = loss(head_scores["dense"]) if dense_loss is None else dense_loss
    if set(head_scores) == {"dense"}:
        return dense
    weights = {"dense": 1.0, "sparse": sparse_loss_weight, "colbert": 1.0}
    assert set(head_scores) == set(weights), f"heads {sorted(head_scores)}"
    together = head_scores["dense"] + sparse_score_weight * head_scores["sparse"] + head_scores["colbert"]
    sparse, colbert = loss(head_scores["sparse"]), loss(head_scores["colbert"])
    total = (dense + loss(together) + sparse_loss_weight * sparse + colbert) / 4
    if not self_distill:
        return total
    distillation = total.new_zeros(())
    for head, weight in weights.items():
        distillation = distillation + weight * distilled(head_scores[head], together, temperature, allowed)
    return (total + distillation / 3) / 2


def distilled(scores: Tensor, teacher: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    """Mean over queries of the cross-entropy to the teacher's softmax over all passages, a float32 scalar in nats.

    Args:
        scores: [Q, P] before the temperature.
        teacher: [Q, P] before the temperature; gets no gradient.
        temperature: greater than 0; divides both.
        allowed: [Q, P] bool, False where a passage takes no part. None: all do.
    """
    student, target = scores.float() / temperature, teacher.detach().float() / temperature
    if allowed is None:
        return -(torch.softmax(target, dim=-1) * torch.log_softmax(student, dim=-1)).sum(dim=-1).mean()
    target = torch.softmax(target.masked_fill(~allowed, -torch.inf), dim=-1)
    # 0 x -inf is not a number, in the loss and in its gradient: the logarithms of what takes no part become 0
    logs = torch.log_softmax(student.masked_fill(~allowed, -torch.inf), dim=-1).masked_fill(~allowed, 0.0)
    return -(target * logs).sum(dim=-1).mean()
