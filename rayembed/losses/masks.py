"""Which passages may be negatives of a query: masks that are True where one may, without gradient.

A query's own group is never masked: its negatives were chosen for this query. Several masks are joined by &.
"""

import torch
from torch import Tensor

from rayembed.losses.contrastive import group_columns


def by_keys(positive_keys: Tensor, passage_keys: Tensor, positives: Tensor, group_size: int) -> Tensor:
    """Leaves out passages of other groups that are positives of the query.

    Args:
        positive_keys: [Q, K] int64, what stands for the ids or texts of each query's positives; 0 where it has fewer.
        passage_keys: [P] int64, the same for the passages; 0 stands for none.
        positives: [Q] int64, the column where each query's group begins.
        group_size: passages in a group.

    Returns:
        [Q, P] bool, False where a passage is no negative.
    """
    allowed = ~share_keys(positive_keys, passage_keys.unsqueeze(1))
    return allowed.scatter(1, group_columns(positives, group_size), True)


def share_keys(keys: Tensor, others: Tensor) -> Tensor:
    """Whether two texts have a key other than 0 in common: [A, B] bool.

    Args:
        keys: [A, K] int64.
        others: [B, L] int64.
    """
    shared = keys.new_zeros(len(keys), len(others), dtype=torch.bool)
    for own in keys.unbind(1):  # one column at a time: [A, B] at once, not [A, B, K, L]
        for other in others.unbind(1):
            shared |= (own.unsqueeze(1) == other) & (other != 0)
    return shared


def by_margin(scores: Tensor, positives: Tensor, group_size: int, margin: float) -> Tensor:
    """Leaves out passages of other groups that score above the query's positive plus a margin.

    Args:
        scores: [Q, P] before the temperature, of the trained model or of a guide.
        positives: [Q] int64, the column where each query's group begins, with its positive.
        group_size: passages in a group.
        margin: in units of `scores`. Below 0, passages just below the positive are left out too.

    Returns:
        [Q, P] bool, False where a passage is no negative.

    Source: of the model itself, NV-Retriever, arXiv:2407.15831; of a guide, GISTEmbed, arXiv:2402.16829.
    """
    positive = scores.detach().gather(1, positives.unsqueeze(1)).squeeze(1)
    return up_to(scores, positive + margin).scatter(1, group_columns(positives, group_size), True)


def up_to(scores: Tensor, ceilings: Tensor) -> Tensor:
    """Where a row's scores are not above its ceiling: [Q, N] bool.

    Args:
        scores: [Q, N].
        ceilings: [Q].
    """
    # not `<=`: what is not a number stays in, and is seen in the loss
    return ~(scores.detach() > ceilings.detach().unsqueeze(1))
