"""Contrastive losses over score matrices.

Shapes: Q queries of this rank, P passages and R queries of all ranks, G passages in a query's own group. The mean over
ranks of each loss is that of the global batch.
"""

from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Each_co = TypeVar("Each_co", covariant=True)


def info_nce(scores: Tensor, positives: Tensor, *, temperature: float, allowed: Tensor | None = None) -> Tensor:
    """Cross-entropy of each query's positive against every other passage.

    Args:
        scores: [Q, P] before the temperature; higher means more relevant.
        positives: [Q] int64, the column of each query's positive passage.
        temperature: greater than 0; divides the scores.
        allowed: [Q, P] bool, False where a passage is no negative of the query; the positive always takes part. None:
            all are.

    Returns:
        Mean over queries, a float32 scalar in nats. Equal scores give log(P).

    Raises:
        ValueError: `positives` does not hold one column per query.

    Source: InfoNCE, arXiv:1807.03748; in-batch negatives, arXiv:2004.04906.
    """
    if positives.shape != scores.shape[:1]:
        raise ValueError(f"positives has shape {tuple(positives.shape)}; scores {tuple(scores.shape)} need one per row")
    logits = taking_part(scores.float() / temperature, allowed, positives.unsqueeze(1), own=True)
    return F.cross_entropy(logits, positives)


def symmetric_info_nce(
    scores: Tensor,
    positives: Tensor,
    reverse: Tensor,
    queries: Tensor,
    *,
    temperature: float,
    allowed: Tensor | None = None,
    reverse_allowed: Tensor | None = None,
) -> Tensor:
    """Mean of two InfoNCE: each query against passages, and each query's positive against queries.

    Args:
        scores: [Q, P] of queries and passages, before the temperature.
        positives: [Q] int64, the column in `scores` of each query's positive.
        reverse: [Q, R] of each query's positive and the queries, before the temperature.
        queries: [Q] int64, the column in `reverse` of each query itself.
        temperature: greater than 0; divides the scores.
        allowed: [Q, P] bool, as for info_nce.
        reverse_allowed: [Q, R] bool, False where a query is no negative of the row's positive. None: all are.

    Source: CLIP, arXiv:2103.00020; sentence-transformers 6, MultipleNegativesSymmetricRankingLoss.
    """
    forward = info_nce(scores, positives, temperature=temperature, allowed=allowed)
    return (forward + info_nce(reverse, queries, temperature=temperature, allowed=reverse_allowed)) / 2


class FourWays(NamedTuple, Generic[Each_co]):
    """One thing (scores, or what is allowed of them) for each two kinds of text; row i belongs to query i."""

    query_passage: Each_co
    """[Q, P] each query and the passages."""

    query_query: Each_co
    """[Q, R] each query and the queries."""

    passage_query: Each_co
    """[Q, R] each query's positive and the queries."""

    passage_passage: Each_co
    """[Q, P] each query's positive and the passages."""


def improved_info_nce(
    scores: FourWays[Tensor],
    positives: Tensor,
    queries: Tensor,
    *,
    temperature: float,
    group_size: int,
    allowed: FourWays[Tensor | None] | None = None,
) -> Tensor:
    """InfoNCE in which queries also compete with queries, and the positive with both.

    With q a query, d its positive and s the score over the temperature, the mean over queries of -log(exp s(q, d) / Z),
    where Z sums exp of: s(q, every passage), s(q, other queries), s(d, other queries), s(d, passages of other groups).
    What a query's own group says of its positive is left out: hard negatives may be alike to it.

    Args:
        scores: before the temperature.
        positives: [Q] int64, the column of passages where each query's group begins, with its positive.
        queries: [Q] int64, the column of queries of each query itself.
        temperature: greater than 0; divides the scores.
        group_size: G.
        allowed: bool, False where a text is no negative. None, whole or in part: all are.

    Source: GTE, arXiv:2308.03281. s(q, d) is once in Z; sentence-transformers 6 has it twice, as a passage of the query
    and as a query of the passage.
    """
    allowed = allowed or FourWays(None, None, None, None)
    positive, query = positives.unsqueeze(1), queries.unsqueeze(1)
    group = group_columns(positives, group_size)
    parts = [
        taking_part(scores.query_passage, allowed.query_passage, positive, own=True),
        taking_part(scores.query_query, allowed.query_query, query, own=False),
        taking_part(scores.passage_query, allowed.passage_query, query, own=False),
        taking_part(scores.passage_passage, allowed.passage_passage, group, own=False),
    ]
    return F.cross_entropy(torch.cat(parts, dim=1).float() / temperature, positives)


def taking_part(scores: Tensor, allowed: Tensor | None, columns: Tensor, *, own: bool) -> Tensor:
    """The scores, -inf where a text does not take part in a softmax.

    Args:
        scores: [Q, N].
        allowed: [Q, N] bool, False where a text does not take part. None: all do.
        columns: [Q, K] int64, the columns of each row's own texts, for which `allowed` does not count.
        own: whether those take part.
    """
    if allowed is None:
        return scores if own else scores.scatter(1, columns, -torch.inf)
    assert allowed.shape == scores.shape, f"allowed has shape {tuple(allowed.shape)}, scores {tuple(scores.shape)}"
    return scores.masked_fill(~allowed.scatter(1, columns, own), -torch.inf)


def group_columns(positives: Tensor, group_size: int) -> Tensor:
    """[Q, G] int64, the columns of each query's own group, the positive first.

    Args:
        positives: [Q] int64, the column where each query's group begins.
        group_size: G.
    """
    return positives.unsqueeze(1) + torch.arange(group_size, device=positives.device)


def group_scores(scores: Tensor, positives: Tensor, group_size: int) -> Tensor:
    """The scores of each query's own group: [Q, G] out of [Q, P], the positive first.

    Args:
        scores: [Q, P].
        positives: [Q] int64, the column where each query's group begins.
        group_size: G.
    """
    return scores.gather(1, group_columns(positives, group_size))
