"""Attention that drops weights on a CPU: the formula, in torch's own steps, with the same weights dropped."""

import pytest
import torch
from torch import Tensor

from rayembed.models.attention_dropout import attention_with_dropout, dropped

SIZES = (2, 3, 7, 5)  # texts, heads, tokens, dimensions
CAUSAL = torch.ones(SIZES[2], SIZES[2], dtype=torch.bool).tril()


def rows(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZES, generator=draw, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("seen", [None, CAUSAL])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_outputs_and_gradients_are_those_of_the_formula(seen: Tensor | None, dropout: float) -> None:
    mine, plain = rows(0), rows(0)
    torch.manual_seed(3)
    found = attention_with_dropout(*mine, scale=0.3, seen=seen, dropout=dropout)
    torch.manual_seed(3)
    n, h, t, _ = SIZES
    mask = dropped(int(torch.randint(2**62, ())), n * h * t * t, dropout).view(n, h, t, t)
    query, key, value = plain
    scores = query @ key.transpose(2, 3) * 0.3
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.where(mask, torch.zeros(()), scores.softmax(dim=-1))
    expected = weights @ value / (1 - dropout)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # a probability is a multiple of 1 / 65536
    weights_of_loss = torch.randn(SIZES, generator=torch.Generator().manual_seed(9))
    for outputs in (found, expected):
        (outputs * weights_of_loss).sum().backward()  # type: ignore[no-untyped-call]
    for own, other in zip(mine, plain, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-4)
        assert float(own.grad.norm()) > 0.1


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.9])
def test_as_many_are_dropped_as_told(dropout: float) -> None:
    count = 400_001
    mask = dropped(5, count, dropout)
    assert mask.shape == (count,)
    assert float(mask.double().mean()) == pytest.approx(dropout, abs=4 * (dropout * (1 - dropout) / count) ** 0.5)
    assert not torch.equal(mask, dropped(6, count, dropout))
    both = float((mask[1:] & mask[:-1]).double().mean())
    assert both == pytest.approx(dropout**2, abs=5 * (dropout / count) ** 0.5), "neighbours are dropped by themselves"


def test_its_mean_is_attention_without_dropping() -> None:
    query, key, value = (own.detach() for own in rows(1))
    draws = [attention_with_dropout(query, key, value, scale=0.3, seen=None, dropout=0.2) for _ in range(4000)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(torch.stack(draws).mean(0), expected, atol=0.05, rtol=0)


def test_torch_s_state_decides_what_is_dropped() -> None:
    query, key, value = rows(2)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(attention_with_dropout(query, key, value, scale=1.0, seen=None, dropout=0.3))
    assert torch.equal(*found)
    assert not torch.equal(found[0], attention_with_dropout(query, key, value, scale=1.0, seen=None, dropout=0.3))
