"""Vectors of which every beginning is a good vector too: any loss, averaged over some lengths (arXiv:2205.13147)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def beginnings(vectors: Tensor, dims: Sequence[int], *, normalize: bool) -> list[Tensor]:
    """The first d numbers of every vector, [N, d] for each d.

    Args:
        vectors: [N, D]; of length 1 or not, which makes no difference where `normalize` is true.
        dims: the lengths d, from 1 to D.
        normalize: scale each beginning to length 1, as vectors of that size are in use.

    Raises:
        ValueError: a length is above D.
    """
    width = vectors.shape[-1]
    if max(dims) > width:
        raise ValueError(f"train.mrl_dims has {max(dims)}, and vectors have {width} dimensions; set {width} or less")
    parts = [vectors[:, :size] for size in dims]
    return [F.normalize(part, dim=-1) for part in parts] if normalize else parts
