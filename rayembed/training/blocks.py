"""A mean over many rows, some of them at a time, whose gradient is taken on the way.

A graph that waits for its backward pass would hold every block's scores, or, with checkpointing, compute them twice;
and the little that each block leaves behind kept the allocator from using the memory of the block before again (8,192
queries took 800 MiB more).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Means = Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Tensor]


def mean_in_blocks(mean_of: Means, by_row: Sequence[Tensor], shared: Sequence[Tensor], *, rows: int) -> Tensor:
    """The mean over n rows, with gradient.

    Args:
        mean_of: the mean over some rows, from where they lie, their parts of `by_row`, and `shared`. It draws nothing
            at random and calls no other worker.
        by_row: [n, ...] each.
        shared: what all rows look at.
        rows: at a time.
    """
    learns = torch.is_grad_enabled()
    mean: Tensor = _Blocks.apply(mean_of, rows, len(by_row), learns, *by_row, *shared)  # type: ignore[no-untyped-call] # torch types no apply
    return mean


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_of: Means, rows: int, of_rows: int, learns: bool, *tensors: Tensor) -> Tensor:  # noqa: ANN401 - of torch
        wanted = [learns and needed for needed in ctx.needs_input_grad[4:]]
        by_row, shared = tensors[:of_rows], _leaves(tensors[of_rows:], wanted[of_rows:])
        gradients = [torch.zeros_like(own) if yes else None for own, yes in zip(by_row, wanted, strict=False)]
        total, mean = len(by_row[0]), torch.zeros((), device=tensors[0].device)
        for first in range(0, total, rows):
            place = slice(first, first + rows)
            parts = _leaves([own[place] for own in by_row], wanted)
            with torch.set_grad_enabled(any(wanted)):
                block = mean_of(place, parts, shared) * (min(rows, total - first) / total)
            if block.requires_grad:
                block.backward()  # type: ignore[no-untyped-call] # torch types no backward
            for gradient, part in zip(gradients, parts, strict=True):
                if gradient is not None and part.grad is not None:
                    gradient[place] = part.grad
            mean += block.detach()
        ctx.save_for_backward(*gradients, *(own.grad for own in shared))
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - of torch
        gradients = (None if own is None else own * outputs[0] for own in ctx.saved_tensors)
        return None, None, None, None, *gradients


def _leaves(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The same tensors, where a gradient is gathered if it is wanted."""
    return [own.detach().requires_grad_(yes) for own, yes in zip(tensors, wanted, strict=False)]
