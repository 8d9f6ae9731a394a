"""All-gather that keeps gradients, so that every rank's passages are negatives of every query.

Each rank's loss is the mean over its own queries. The backward pass sums over ranks what every rank's loss says about
this rank's passages, and DDP's or DeepSpeed's mean over ranks then gives the gradient of the global mean loss exactly:
no factor of the world size is left over. `torch.distributed.nn.all_gather` computes the same by one reduce per rank;
this is one all-reduce.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # noqa: ANN401 - torch gives ctx no type
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401 - of torch
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [N, ...] on each of W ranks gives [W x N, ...] on all, differentiable.

    Every rank must bring the same shape. Without a process group, or alone in it, the input itself comes back.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call] # torch types no apply
    return gathered


def first_row(local_rows: int) -> int:
    """Index of this rank's first row in what `gather_with_grad` returns."""
    return dist.get_rank() * local_rows if dist.is_initialized() else 0


def largest_of_workers(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers; the device is where they can be compared."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
