"""Losses of pairs of texts with a graded label: higher labels shall score higher.

A label is compared with those of all pairs of the global batch, and one logarithm is taken over all comparisons, so the
loss is no mean over ranks. For the same value and gradient on any number of ranks, each rank gathers scores (or
vectors) and labels of all, with gradient, and computes the whole loss. The gather's backward pass sums what W ranks say
of each row, W times the gradient, and the mean over ranks takes the W away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosent(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """log(1 + sum of exp((s_j - s_i) / temperature) over pairs i, j where i has the higher label).

    Args:
        scores: [N] of the pairs of all ranks, as a rule cosines.
        labels: [N], any numbers; only their order counts.
        temperature: greater than 0; divides the scores.

    Returns:
        A float32 scalar in nats; 0 where all labels are equal. N x N numbers are held on the way.

    Source: CoSENT, doi:10.1109/TASLP.2024.3402087.
    """
    assert scores.shape == labels.shape, f"{tuple(scores.shape)} scores and {tuple(labels.shape)} labels"
    logits = scores.float() / temperature
    excess = logits.unsqueeze(0) - logits.unsqueeze(1)  # row i, column j: s_j - s_i
    excess = excess.masked_fill(labels.unsqueeze(1) <= labels.unsqueeze(0), -torch.inf)
    return torch.logsumexp(torch.cat([logits.new_zeros(1), excess.flatten()]), dim=0)


def angle(x: Tensor, y: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """CoSENT over the angle similarity, whose gradient does not vanish where cosines are near 1 or -1.

    Args:
        x: [N, D] vectors of the first texts of all ranks' pairs.
        y: [N, D] vectors of the second.
        labels: [N], any numbers; only their order counts.
        temperature: greater than 0; divides the similarities.

    Source: AnglE, arXiv:2309.12871, its angle term alone.
    """
    return cosent(angle_similarity(x, y), labels, temperature=temperature)


def angle_similarity(x: Tensor, y: Tensor) -> Tensor:
    """|Re + Im| of the product of x and the conjugate of y as complex vectors of length 1: [N].

    A vector's first half are the real parts and its second half the imaginary; one of odd length gets a 0 at its end.

    Args:
        x: [N, D].
        y: [N, D].

    Source: AnglE, arXiv:2309.12871, as in sentence-transformers 6.
    """
    odd = x.shape[1] % 2
    (a, b), (c, d) = (F.pad(F.normalize(v.float(), dim=-1), (0, odd)).chunk(2, dim=1) for v in (x, y))
    return ((a * c + b * d) + (b * c - a * d)).sum(dim=1).abs()
