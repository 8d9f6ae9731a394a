"""Dropout on a CPU: the formula, in torch's own steps, with the same values dropped; and how often they are."""

import pytest
import torch
from torch import Tensor, nn

from rayembed.models.dropout import (
    QuickDropout,
    _bits,
    _first_kept,
    _seed,
    attention_with_dropout,
    use_quick_dropout,
)

SIZES = (2, 3, 7, 5)  # texts, heads, tokens, dimensions
CAUSAL = torch.ones(SIZES[2], SIZES[2], dtype=torch.bool).tril()


def rows(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZES, generator=draw, requires_grad=True) for _ in range(3)]


def dropped(seed: int, count: int, dropout: float) -> Tensor:
    return _bits(seed, count) < _first_kept(dropout)


@pytest.mark.parametrize("seen", [None, CAUSAL])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_outputs_and_gradients_are_those_of_the_formula(seen: Tensor | None, dropout: float) -> None:
    mine, plain = rows(0), rows(0)
    torch.manual_seed(3)
    found = attention_with_dropout(*mine, scale=0.3, seen=seen, dropout=dropout)
    torch.manual_seed(3)
    n, h, t, _ = SIZES
    mask = dropped(_seed(), n * h * t * t, dropout).view(n, h, t, t)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_drops_as_many_and_raises_the_others(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Dropout(0.25), nn.Dropout(0.0))
    use_quick_dropout(model)
    assert [type(module) for module in model] == [QuickDropout, QuickDropout]
    ones = torch.ones(300, 1001, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    found = model(ones)
    assert found.dtype == dtype
    assert sorted(found.unique().tolist()) == pytest.approx([0, 4 / 3], rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert float((found == 0).double().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / ones.numel()) ** 0.5)
    found.float().sum().backward()  # type: ignore[no-untyped-call]
    assert ones.grad is not None
    assert torch.equal(ones.grad, found.detach())
    torch.manual_seed(4)
    assert torch.equal(model(ones), found), "torch's state decides"
    assert not torch.equal(model(ones), found)
    assert torch.equal(model.eval()(ones), ones)


def test_only_plain_dropout_is_replaced() -> None:
    model = nn.Sequential(nn.Dropout1d(0.5), nn.Sequential(nn.Dropout(0.5)))
    use_quick_dropout(model)
    assert [type(module) for module in model.modules()][1:] == [nn.Dropout1d, nn.Sequential, QuickDropout]
