"""The FLOPS regulariser is its definition, with and without the columns that nothing is in."""

import torch
from torch import Tensor

from rayembed.losses import flops
from tests.losses import reference


def weights() -> Tensor:
    """6 texts over a vocabulary of 9, of which 4 entries occur."""
    found = torch.zeros(6, 9)
    found[:, [1, 4, 5, 8]] = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) * 3
    return found


def expected(given: Tensor) -> Tensor:
    means = [sum(row[column] for row in given) / len(given) for column in range(given.shape[1])]
    return torch.stack([mean * mean for mean in means]).sum()


def test_flops_is_its_definition() -> None:
    reference.assert_same(flops, expected, weights())


def test_entries_that_do_not_occur_may_be_left_out() -> None:
    torch.testing.assert_close(flops(weights()[:, [1, 4, 5, 8]]), flops(weights()))


def test_half_precision_weights_are_summed_in_float32() -> None:
    many = torch.full((3000, 1), 0.1, dtype=torch.bfloat16)
    torch.testing.assert_close(flops(many), many[0, 0].float() ** 2)
