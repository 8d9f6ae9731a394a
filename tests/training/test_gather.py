"""The gather gives every rank all rows and every row the gradient of all ranks."""

import pytest
import torch

from rayembed.training.gather import first_row, gather_with_grad
from tests.training.processes import in_workers

ROWS = 2


def own_rows(rank: int) -> torch.Tensor:
    return torch.arange(ROWS * 3, dtype=torch.float32).view(ROWS, 3) + 10 * rank


def says(rank: int, world_size: int) -> torch.Tensor:
    """What a rank's loss says about each gathered row."""
    return torch.randn(world_size * ROWS, 3, generator=torch.Generator().manual_seed(rank))


def gather_and_return_gradient() -> tuple[torch.Tensor, torch.Tensor, int]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = own_rows(rank).T.contiguous().T.requires_grad_()  # rows need not lie one after the other in memory
    gathered = gather_with_grad(local)
    (gathered * says(rank, world_size)).sum().backward()
    assert local.grad is not None
    return gathered.detach(), local.grad, first_row(ROWS)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_come_in_rank_order_and_gradients_from_every_rank(world_size: int) -> None:
    said = sum(says(rank, world_size) for rank in range(world_size))
    assert isinstance(said, torch.Tensor)
    for rank, (gathered, grad, start) in enumerate(in_workers(world_size, gather_and_return_gradient)):
        assert torch.equal(gathered, torch.cat([own_rows(r) for r in range(world_size)]))
        assert start == rank * ROWS
        torch.testing.assert_close(grad, said[start : start + ROWS])


def test_alone_the_input_itself_comes_back() -> None:
    local = torch.zeros(2, 3)
    assert gather_with_grad(local) is local
    assert first_row(2) == 0
