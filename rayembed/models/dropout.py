"""Dropout on a CPU, where torch's own took half of a training step: it draws a float for each value, and slowly.

Here 16 random bits decide on each, so that a probability is a multiple of 1 / 65536; the seed of the bits comes from
torch's generator, and who sets its state gets the same values dropped again.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STEPS = 2**16


def use_quick_dropout(model: nn.Module) -> None:
    """Lets all dropout modules of a model drop by `QuickDropout` while their inputs are on a CPU."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = QuickDropout


class QuickDropout(nn.Dropout):
    """Drops values with probability p, and raises the others by 1 / (1 - p)."""

    def forward(self, input: Tensor) -> Tensor:
        """The same shape."""
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        kept = (_bits(_seed(), input.numel()) >= _first_kept(self.p)).view(input.shape)
        return input * (kept.to(input.dtype) * _raised(self.p))


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
    flat = (rows.reshape(-1, *rows.shape[2:]) for rows in (query, key, value))
    attended: Tensor = _Attention.apply(*flat, scale, seen, dropout, _seed())  # type: ignore[no-untyped-call] # torch types no apply
    return attended.view(*query.shape[:-1], value.shape[-1])


class _Attention(torch.autograd.Function):
    """Rows [b, t, d]; weights are stored with a minus where they are dropped, so that few passes over them do."""

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
        scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        # Dropped: below 0, never 0 itself.
        signs = _bits(seed, weights.numel()).to(weights.dtype).sub_(_first_kept(dropout) - 0.5).view(weights.shape)
        signed = torch.copysign(weights, signs, out=signs)
        ctx.save_for_backward(query, key, value, signed)
        ctx.scale, ctx.raised = scale, _raised(dropout)
        kept = torch.clamp_min(signed, 0, out=weights)
        return torch.baddbmm(value.new_empty(()), kept, value, beta=0, alpha=ctx.raised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - of torch
        query, key, value, signed = ctx.saved_tensors
        gradient, none = gradients[0], gradients[0].new_empty(())
        kept = signed.clamp_min(0)
        of_value = torch.baddbmm(none, kept.mT, gradient, beta=0, alpha=ctx.raised)
        of_kept = torch.baddbmm(none, gradient, value.mT, beta=0, alpha=ctx.raised)
        of_weights = torch.ops.aten.threshold_backward(of_kept, signed, 0)
        of_scores = torch._softmax_backward_data(of_weights, torch.abs(signed, out=kept), -1, signed.dtype)
        of_query = torch.baddbmm(none, of_scores, key, beta=0, alpha=ctx.scale)
        of_key = torch.baddbmm(none, of_scores.mT, query, beta=0, alpha=ctx.scale)
        return of_query, of_key, of_value, None, None, None, None


def _seed() -> int:
    return int(torch.randint(2**62, ()))


def _bits(seed: int, count: int) -> Tensor:
    """[count] int16, each value as likely."""
    return torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count])


def _first_kept(dropout: float) -> int:
    """The first value of `_bits` that drops nothing."""
    return round(dropout * STEPS) - STEPS // 2


def _raised(dropout: float) -> float:
    return STEPS / (STEPS - round(dropout * STEPS))
