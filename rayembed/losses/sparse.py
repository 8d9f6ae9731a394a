"""What keeps sparse vectors sparse."""

from torch import Tensor


def flops(weights: Tensor) -> Tensor:
    """Sum over the vocabulary of the squared mean weight of an entry: a smooth count of the work of a search.

    The squares stand outside the mean, so the mean over ranks of each rank's own value is not that of the global batch.
    Either each rank gathers the rows of all with gradient, or, which gives the same, each takes the mean of its own
    rows, gathers those W rows with gradient, and hands them over here.

    Args:
        weights: [N, V], 0 or more; columns in which all are 0 may be left out, the same on all rows.

    Returns:
        A float32 scalar in squared units of the weights.

    Source: arXiv:2004.05665.
    """
    return weights.float().mean(dim=0).square().sum()
