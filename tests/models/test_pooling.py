"""Each pooling against a plain loop over texts, on either padding side."""

import pytest
import torch
from torch import Tensor

from rayembed.models.pooling import POOLINGS

LENGTHS = (5, 1, 3, 4)


def masked(side: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return torch.randn(len(LENGTHS), max(LENGTHS), 6), mask


def reference(pooling: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """The definition, one text at a time."""
    pooled = []
    for tokens, kept in zip(hidden, mask, strict=True):
        own = [token for token, keep in zip(tokens, kept.tolist(), strict=True) if keep]
        pooled.append(
            {"cls": own[0], "mean": torch.stack(own).double().mean(0).float(), "last_token": own[-1]}[pooling]
        )
    return torch.stack(pooled)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_matches_the_definition(pooling: str, side: str) -> None:
    hidden, mask = masked(side)
    torch.testing.assert_close(POOLINGS[pooling](hidden, mask), reference(pooling, hidden, mask), atol=1e-6, rtol=0)


def test_mean_adds_up_in_float32() -> None:
    """In bfloat16, 256 + 1 is 256."""
    hidden = torch.cat([torch.full((1, 1, 1), 256.0), torch.ones(1, 255, 1)], dim=1).bfloat16()
    mean = POOLINGS["mean"](hidden, torch.ones(1, 256, dtype=torch.long))
    assert mean.item() == pytest.approx((256 + 255) / 256, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_padding_gets_no_gradient(pooling: str, side: str) -> None:
    hidden, mask = masked(side)
    hidden.requires_grad_(True)
    POOLINGS[pooling](hidden, mask).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad[mask == 0].abs().max() == 0
    assert bool((hidden.grad.abs().sum((1, 2)) > 0).all())
