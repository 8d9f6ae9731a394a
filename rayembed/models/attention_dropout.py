"""Attention whose weights are dropped at random, on a CPU: torch has no fast kernel for it there.

Torch's own draws a float for each weight and goes over the weights eight times. Here 16 random bits decide on each, and
what is multiplied is the same. In a training step of MiniLM this took a third of the time of all before.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS = 2**16  # a probability is rounded to a multiple of 1 / STEPS


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, seen: Tensor | None, dropout: float
) -> Tensor:
    """softmax(query key^T scale) value, each weight dropped with a probability, and what stays raised for it.

    Args:
        query: [n, h, t, d] of one type with the others, on a CPU.
        key: [n, h, t, d]
        value: [n, h, t, d]
        scale: multiplies the products.
        seen: [t, t] bool, True where a token (row) sees another. None: all see all.
        dropout: above 0, below 1.
    """
    sizes = query.shape
    flat = (rows.reshape(-1, *rows.shape[2:]) for rows in (query, key, value))
    seed = int(torch.randint(2**62, ()))  # by torch's generator, so that who sets its state gets the same again
    attended: Tensor = _Dropped.apply(*flat, scale, seen, dropout, seed)  # type: ignore[no-untyped-call]
    return attended.view(sizes)


def dropped(seed: int, count: int, dropout: float) -> Tensor:
    """[count] bool, True with a probability of `dropout`, a function of the seed."""
    bits = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    return torch.from_numpy(bits) < round(dropout * STEPS) - STEPS // 2


class _Dropped(torch.autograd.Function):
    """Rows [b, t, d]; keeps the weights before they are dropped, and draws again what was dropped."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - of torch
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        seen: Tensor | None,
        dropout: float,
        seed: int,
    ) -> Tensor:
        scores = query.new_empty(len(query), query.shape[1], key.shape[1])
        torch.baddbmm(scores, query, key.mT, beta=0, alpha=scale, out=scores)
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed
        ctx.raised = STEPS / (STEPS - round(dropout * STEPS))
        kept = weights.masked_fill(_mask(weights, seed, dropout), 0)
        return torch.baddbmm(scores.new_empty(value.shape), kept, value, beta=0, alpha=ctx.raised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - of torch
        query, key, value, weights = ctx.saved_tensors
        gradient, mask = gradients[0], _mask(weights, ctx.seed, ctx.dropout)
        new = gradient.new_empty
        kept = weights.masked_fill(mask, 0)
        of_value = torch.baddbmm(new(value.shape), kept.mT, gradient, beta=0, alpha=ctx.raised)
        of_weights = torch.baddbmm(kept, gradient, value.mT, beta=0, alpha=ctx.raised, out=kept).masked_fill_(mask, 0)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.baddbmm(new(query.shape), of_scores, key, beta=0, alpha=ctx.scale)
        of_key = torch.baddbmm(new(key.shape), of_scores.mT, query, beta=0, alpha=ctx.scale)
        return of_query, of_key, of_value, None, None, None, None


def _mask(weights: Tensor, seed: int, dropout: float) -> Tensor:
    return dropped(seed, weights.numel(), dropout).view(weights.shape)
