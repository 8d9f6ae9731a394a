"""One vector a text out of its token vectors. Shapes: N texts, T tokens, D dimensions.

Of packed texts, which lie one after the other, T is that of all of them, and `starts` [N + 1] says where each begins.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first token that is not padding: [N, D] from hidden [N, T, D] and mask [N, T] (1 token, 0 padding)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(dim=1)]


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens that are not padding, in float32: [N, D] from hidden [N, T, D] and mask [N, T]."""
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last token that is not padding, on either padding side: [N, D] from hidden [N, T, D] and mask [N, T]."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cls": cls, "mean": mean, "last_token": last_token}


def packed_cls(hidden: Tensor, starts: Tensor) -> Tensor:
    """The first token of each text: [N, D] from hidden [T, D]."""
    return hidden[starts[:-1].long()]


def packed_mean(hidden: Tensor, starts: Tensor) -> Tensor:
    """The mean over each text's tokens, in float32: [N, D] from hidden [T, D]."""
    return torch.segment_reduce(hidden.float(), "mean", lengths=starts.diff().long(), axis=0, unsafe=True)


def packed_last_token(hidden: Tensor, starts: Tensor) -> Tensor:
    """The last token of each text: [N, D] from hidden [T, D]."""
    return hidden[starts[1:].long() - 1]


PACKED_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": packed_cls,
    "mean": packed_mean,
    "last_token": packed_last_token,
}
