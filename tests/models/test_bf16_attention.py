"""Attention over packed texts in bfloat16 on a CPU: the formula, text by text in float32, and nothing of the others."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rayembed.models import bf16_attention, packing
from rayembed.models.bf16_attention import LONG, SHORT, attention_in_bf16

HEADS, WIDTH = 3, 8
RUNS = {
    "a multiple of the step": [(1, 160)],
    "nothing follows it": [(1, 150)],
    "neighbours that are read too, and none at the end": [(2, 150), (1, 131), (1, 130)],
    "the kernel's beside them": [(1, LONG + 1), (2, 170), (3, 5), (1, SHORT - 1)],
}


def rows(runs: Sequence[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    """Query, key and value [h, t, d], views as a model gives them, and a gradient [t, h, d]."""
    draw, total = torch.Generator().manual_seed(seed), sum(count * length for count, length in runs)
    made = [(2 * torch.randn(total, HEADS, WIDTH, generator=draw)).bfloat16() for _ in range(4)]
    return [own.transpose(0, 1).requires_grad_() for own in made[:3]] + made[3:]


def lengths_of(runs: Sequence[tuple[int, int]]) -> list[int]:
    return [length for count, length in runs for _ in range(count)]


def by_formula(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    parts = zip(*(torch.split(own, list(lengths), dim=1) for own in (query, key, value)), strict=True)
    found = [torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1) @ v for q, k, v in parts]
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.mark.parametrize("name", RUNS)
def test_outputs_and_gradients_are_those_of_the_formula(name: str) -> None:
    runs = RUNS[name]
    *sides, gradient = rows(runs)
    whole = [own.detach().float().requires_grad_() for own in sides]
    found = attention_in_bf16(*sides, runs, scale=0.3)
    expected = by_formula(*whole, lengths_of(runs), 0.3)
    assert found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found, sides, gradient)
    expected_gradients = torch.autograd.grad(expected, whole, gradient.float())
    first = 0
    for length in lengths_of(runs):  # each text by itself, that a short one cannot hide behind a long one
        place = slice(first, first + length)
        close(found[place], expected[place])
        for own, other in zip(gradients, expected_gradients, strict=True):
            close(own[:, place], other[:, place])
        first += length


def close(found: Tensor, expected: Tensor) -> None:
    apart = (found.detach().float() - expected.detach()).norm() / expected.detach().norm()
    assert apart < 0.02  # of bfloat16; what is left out or added is a tenth and more


@pytest.mark.parametrize("learns", [True, False])
def test_weights_are_held_only_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    runs = [(6, 150)]
    *sides, _ = rows(runs)
    places, ends, sizes = list[int](), list[int](), set[int]()
    softmax = torch.softmax

    def watched(scores: Tensor, dim: int, *, out: Tensor) -> Tensor:
        places.append(out.storage_offset())
        ends.append(places[-1] + out.numel())
        sizes.add(out.untyped_storage().nbytes() // 2)
        return softmax(scores, dim=dim, out=out)

    monkeypatch.setattr(torch, "softmax", watched)
    with torch.set_grad_enabled(learns):
        found = attention_in_bf16(*sides, runs, scale=0.3)
    assert found.requires_grad == learns
    assert places == ([0, *ends[:-1]] if learns else [0] * 6)
    (size,) = sizes
    assert max(ends) <= size < max(ends) * 65 / 64


def test_other_texts_have_no_part_in_a_text() -> None:
    runs = RUNS["neighbours that are read too, and none at the end"]
    ends = torch.tensor([0, *lengths_of(runs)]).cumsum(0).tolist()
    *sides, gradient = rows(runs)
    *others, other_gradient = rows(runs, seed=1)
    for first, last in pairwise(ends):
        mixed = []
        for own, other in zip(sides, others, strict=True):
            mixed.append(other.detach().clone())
            mixed[-1][:, first:last] = own.detach()[:, first:last]
            mixed[-1].requires_grad_()
        mixed_gradient = other_gradient.clone()
        mixed_gradient[first:last] = gradient[first:last]
        found, expected = attention_in_bf16(*mixed, runs, scale=0.3), attention_in_bf16(*sides, runs, scale=0.3)
        assert torch.equal(found[first:last], expected[first:last])
        gradients = torch.autograd.grad(found, mixed, mixed_gradient)
        for own, other in zip(gradients, torch.autograd.grad(expected, sides, gradient), strict=True):
            assert torch.equal(own[:, first:last], other[:, first:last])


@pytest.mark.parametrize(
    ("how", "dtype", "taken"),
    [
        (packing._How(0.3, causal=False, reach=None, softcap=None, dropout=0.0), torch.bfloat16, True),
        (packing._How(0.3, causal=False, reach=None, softcap=None, dropout=0.0), torch.float32, False),
        (packing._How(0.3, causal=True, reach=None, softcap=None, dropout=0.0), torch.bfloat16, False),
        (packing._How(0.3, causal=False, reach=9, softcap=None, dropout=0.0), torch.bfloat16, False),
        (packing._How(0.3, causal=False, reach=None, softcap=9.0, dropout=0.0), torch.bfloat16, False),
        (packing._How(0.3, causal=False, reach=None, softcap=None, dropout=0.1), torch.bfloat16, False),
    ],
)
def test_packed_texts_take_this_way_where_it_knows_all_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, how: packing._How, dtype: torch.dtype, taken: bool
) -> None:
    calls = list[float]()

    def counted(*inputs: Tensor, runs: object = None, scale: float) -> Tensor:
        calls.append(scale)
        return bf16_attention.attention_in_bf16(*inputs[:3], inputs[3], scale=scale)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "attention_in_bf16", counted)
    sides = [own.detach().to(dtype) for own in rows([(1, 140), (1, 20)])[:3]]
    segments = packing.Segments(torch.tensor([0, 140, 160]).int(), (140, 20))
    packing._in_runs(*sides, segments, how)
    assert calls == ([0.3] if taken else [])
    calls.clear()
    packing._in_runs(sides[0], sides[1], torch.cat([sides[2], sides[2]], dim=2), segments, how)
    assert not calls, "values of another width"
