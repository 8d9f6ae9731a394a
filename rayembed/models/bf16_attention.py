"""Bidirectional attention over packed texts in bfloat16 on a CPU, as one node of the graph.

torch's kernel takes 2 to 8 times as long backward in bfloat16 as in float32 there, and the products of whole matrices,
which oneDNN does in bfloat16, half as long as that kernel in float32; short texts are quicker in the kernel. A shape
that oneDNN has not met costs it a millisecond, so that a text is read with some of its neighbours' tokens, up to a
multiple of 16 tokens; they get no weight. Scores and weights are rounded to bfloat16, as in a model's own attention
under autocast: a step's gradient was 2.0 % from that of float32, and 1.6 % with the kernel. Shapes: t tokens of all
texts, h heads, d dimensions of a head.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayembed.models.few_sizes import rounded_up

STEP = 16
SHORT, LONG = 128, 1024  # tokens of a text that is read by products, whose weights are held until backward
Runs = Sequence[tuple[int, int]]


def attention_in_bf16(query: Tensor, key: Tensor, value: Tensor, runs: Runs, *, scale: float) -> Tensor:
    """softmax(query key^T scale) value within each text: [t, h, d].

    Args:
        query: [h, t, d] bfloat16, as the others.
        key: [h, t, d]
        value: [h, t, d]
        runs: texts of equal length beside each other: how many, and how long.
        scale: multiplies the products.
    """
    attended: Tensor = _Attention.apply(query, key, value, tuple(runs), scale, torch.is_grad_enabled())  # type: ignore[no-untyped-call] # torch types no apply
    return attended


class _Window(NamedTuple):
    """The tokens that are read for a text, its own and some that follow."""

    rows: slice
    own: slice
    others: slice | None
    """Those that follow, from the first one read. None: there are none."""


class _Room:
    """One piece of memory for the weights of many texts: one for each would leave holes that nothing else fits."""

    def __init__(self, like: Tensor, runs: Runs, *, held: bool) -> None:
        """Allocates it.

        Args:
            like: [h, t, d], whose type and device the weights have.
            runs: as of attention_in_bf16.
            held: whether all weights are held at once. False: each takes the place of the last.
        """
        heads, total, _ = like.shape
        sizes = [
            heads * (window.rows.stop - window.rows.start) ** 2
            for place, _, length in _places(runs)
            if _by_products(length)
            for window in _windows(place, length, total)
        ]
        self._held, self._first = held, 0
        self._memory = like.new_empty(rounded_up(sum(sizes) if held else max(sizes, default=0)))

    def next(self, scores: Tensor) -> Tensor:
        """Room for the weights of these scores, of their shape."""
        first, self._first = self._first, self._first + scores.numel() if self._held else 0
        return self._memory[first : first + scores.numel()].view_as(scores)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - of torch
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: Runs,
        scale: float,
        learns: bool,
    ) -> Tensor:
        attended = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        by_head, none = attended.transpose(0, 1), query.new_empty(())
        room = _Room(query, runs, held=learns)
        kept: list[Tensor] = []
        for place, count, length in _places(runs):
            if not _by_products(length):
                texts = [_folded(rows, place, count) for rows in (query, key, value)]
                found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*texts, scale=scale)
                _unfolded(by_head, place, count).copy_(found)
                kept += [*texts, found, sums] if learns else []
                continue
            for window in _windows(place, length, query.shape[1]):
                scores = torch.baddbmm(none, query[:, window.rows], key[:, window.rows].mT, beta=0, alpha=scale)
                if window.others is not None:
                    scores[:, :, window.others] = -torch.inf
                weights = torch.softmax(scores, dim=-1, out=room.next(scores))
                if window.others is not None:
                    weights[:, window.others] = 0
                by_head[:, window.own] = torch.bmm(weights, value[:, window.rows])[:, :length]
                kept += [weights] if learns else []
        by_products = any(_by_products(length) for _, length in runs)
        ctx.save_for_backward(*([query, key, value] if by_products else [query] * 3), *kept)
        ctx.runs, ctx.scale = runs, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - of torch
        query, key, value, *kept = ctx.saved_tensors
        gradient, saved, scale, none = gradients[0].transpose(0, 1), iter(kept), ctx.scale, query.new_empty(())
        of_query, of_key, of_value = of_rows = [torch.empty_like(gradients[0]).transpose(0, 1) for _ in range(3)]
        for place, count, length in _places(ctx.runs):
            if not _by_products(length):
                *texts, found, sums = (next(saved) for _ in range(5))
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    _folded(gradient, place, count), *texts, found, sums, 0.0, False, scale=scale
                )
                for whole, part in zip(of_rows, parts, strict=True):
                    _unfolded(whole, place, count).copy_(part)
                continue
            for window in _windows(place, length, query.shape[1]):
                rows, own, weights = window.rows, window.own, next(saved)
                of_found = gradient[:, window.rows]
                of_value[:, own] = torch.bmm(weights.mT, of_found)[:, :length]
                of_scores = torch.bmm(of_found, value[:, rows].mT)
                of_scores = torch._softmax_backward_data(of_scores, weights, -1, weights.dtype)
                of_query[:, own] = torch.baddbmm(none, of_scores, key[:, rows], beta=0, alpha=scale)[:, :length]
                of_key[:, own] = torch.baddbmm(none, of_scores.mT, query[:, rows], beta=0, alpha=scale)[:, :length]
        return *of_rows, None, None, None


def _by_products(length: int) -> bool:
    return SHORT <= length <= LONG


def _places(runs: Runs) -> Iterator[tuple[slice, int, int]]:
    """Of each run: where its tokens are, how many texts, how long."""
    ends = accumulate((count * length for count, length in runs), initial=0)
    for first, (count, length) in zip(ends, runs, strict=False):
        yield slice(first, first + count * length), count, length


def _windows(place: slice, length: int, total: int) -> Iterator[_Window]:
    for first in range(place.start, place.stop, length):
        last = min(first + -(-length // STEP) * STEP, total)
        others = slice(length, last - first) if last - first > length else None
        yield _Window(slice(first, last), slice(first, first + length), others)


def _folded(rows: Tensor, place: slice, count: int) -> Tensor:
    """[count, h, length, d] float32 of [h, t, d]."""
    return _unfolded(rows, place, count).to(torch.float32, memory_format=torch.contiguous_format)


def _unfolded(rows: Tensor, place: slice, count: int) -> Tensor:
    """[count, h, length, d], a view of [h, t, d]."""
    heads, _, width = rows.shape
    return rows[:, place].view(heads, count, -1, width).transpose(0, 1)
