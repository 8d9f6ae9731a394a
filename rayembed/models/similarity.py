"""Scores of queries and passages by each of BGE-M3's three representations; functions of `M3Embedder`'s outputs.

What is too big to be held is never made: the vocabulary (250,000 tokens in XLM-R) is cut to the tokens at hand, and
similarities of all tokens with all tokens (64 queries of 64 tokens, 512 passages of 512: 4 GiB) go by in blocks.

Shapes: Q queries, P passages, N of both in pairs, Tq and Tp tokens, C dimensions, U different tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Texts = Mapping[str, Tensor]
Score = Callable[[Texts, Texts], Tensor]

BLOCK_ELEMENTS = 2**25  # similarities in a block: 128 MiB in float32, and a few times that in its backward pass


def dense_matrix(queries: Texts, passages: Texts) -> Tensor:
    """Dot products [Q, P] of the dense vectors."""
    return queries["dense"] @ passages["dense"].T


def dense_paired(queries: Texts, passages: Texts) -> Tensor:
    """Dot products [N] of the dense vectors, row i with row i."""
    return (queries["dense"] * passages["dense"]).sum(dim=-1)


def sparse_matrix(queries: Texts, passages: Texts) -> Tensor:
    """Dot products [Q, P] of the sparse vectors. A token counts once a text, with its highest weight there."""
    tokens = torch.unique(queries["ids"])  # no other token can add to a dot product
    return _over_tokens(queries, tokens) @ _over_tokens(passages, tokens).T


def sparse_paired(queries: Texts, passages: Texts) -> Tensor:
    """Dot products [N] of the sparse vectors, row i with row i."""
    tokens = queries["ids"].sort(dim=1).values  # a vocabulary for each pair: [N, Tq], however many pairs there are
    return (_over_tokens(queries, tokens) * _over_tokens(passages, tokens)).sum(dim=-1)


def compacted_sparse(texts: Texts) -> Tensor:
    """Sparse vectors [N, U] over the U tokens that occur in the texts, by rising id."""
    return _over_tokens(texts, torch.unique(texts["ids"]))


def _over_tokens(texts: Texts, tokens: Tensor) -> Tensor:
    """Highest weights [N, U] of the tokens [U], or [N, U] with some for each text; rising, first of equal ones used."""
    ids = texts["ids"].contiguous()
    places = torch.searchsorted(tokens, ids).clamp(max=tokens.shape[-1] - 1)
    found = (tokens[places] if tokens.ndim == 1 else tokens.gather(1, places)) == ids
    weights = texts["sparse"].where(found, 0)
    empty = weights.new_zeros(len(ids), tokens.shape[-1])
    return empty.scatter_reduce(1, places, weights, reduce="amax")  # weights are not negative, so 0 is their floor


def colbert_matrix(queries: Texts, passages: Texts, *, block_elements: int = BLOCK_ELEMENTS) -> Tensor:
    """MaxSim [Q, P]: the mean over a query's tokens of the highest dot product with a token of the passage.

    Padding never counts, on neither side (FlagEmbedding's padding is a token of similarity 0, so its scores depend on
    what else is in the batch). A text without tokens scores 0.

    Args:
        queries: their colbert [Q, Tq, C] and mask [Q, Tq].
        passages: their colbert [P, Tp, C] and mask [P, Tp].
        block_elements: similarities of tokens that are in memory at once, at least one query's with one passage; the
            backward pass computes them again.

    Source: ColBERT, arXiv:2004.12832; its mean over the query's tokens, arXiv:2402.03216.
    """
    masks = queries["mask"].bool().unsqueeze(1), passages["mask"].bool()
    one = masks[0].shape[-1] * masks[1].shape[-1]
    rows = max(1, min(len(masks[0]), block_elements // one))
    columns = max(1, block_elements // (one * rows))
    of_passages = list(zip(torch.split(passages["colbert"], columns), torch.split(masks[1], columns), strict=True))
    return torch.cat(
        [
            torch.cat([_recomputed("qic,pjc->qpij", *left, *right) for right in of_passages], dim=1)
            for left in zip(torch.split(queries["colbert"], rows), torch.split(masks[0], rows), strict=True)
        ]
    )


def colbert_paired(queries: Texts, passages: Texts, *, block_elements: int = BLOCK_ELEMENTS) -> Tensor:
    """MaxSim [N], row i with row i; see `colbert_matrix`."""
    sides = (queries["colbert"], queries["mask"].bool(), passages["colbert"], passages["mask"].bool())
    rows = max(1, block_elements // (sides[1].shape[1] * sides[3].shape[1]))
    blocks = zip(*(torch.split(side, rows) for side in sides), strict=True)
    return torch.cat([_recomputed("nic,njc->nij", *block) for block in blocks])


def _recomputed(equation: str, *block: Tensor) -> Tensor:
    scores: Tensor = checkpoint(_max_sim, equation, *block, use_reentrant=False, preserve_rng_state=False)
    return scores


def _max_sim(equation: str, query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
    similarities = torch.einsum(equation, query, passage)  # [..., Tq, Tp]
    best = similarities.masked_fill_(~passage_mask.unsqueeze(-2), -torch.inf).amax(dim=-1).float()
    counted = query_mask & passage_mask.any(dim=-1, keepdim=True)
    return best.masked_fill(~counted, 0).sum(dim=-1) / query_mask.sum(dim=-1).clamp(min=1)


@dataclass(frozen=True)
class Similarity:
    """How one representation of queries and passages becomes scores."""

    matrix: Score
    """[Q, P]: every query with every passage."""

    paired: Score
    """[N]: row i with row i."""


SIMILARITIES = {
    "dense": Similarity(dense_matrix, dense_paired),
    "sparse": Similarity(sparse_matrix, sparse_paired),
    "colbert": Similarity(colbert_matrix, colbert_paired),
}


def weighted_sum(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Scores by several representations as one, of their shape; every one of `scores` has a weight.

    FlagEmbedding trains with 1, 0.3, 1 for dense, sparse, colbert, and its inference divides their plain sum by 3.
    """
    return sum((weights[name] * values for name, values in scores.items()), start=torch.zeros(()))
