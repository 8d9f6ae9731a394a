"""The order of a long positive's thirds, changed for a share of the rows: FlagEmbedding's shuffle_ratio, stateless.

FlagEmbedding cuts the text of more than 100 characters; here its tokens are cut, because texts are tokenised once,
ahead of training. A word at a cut stays whole or not as its tokens fall, and what was cut off the text by
passage_max_len does not come back.
"""

import numpy as np
from numpy.typing import NDArray

_SHUFFLE = 4  # stream of random numbers; see plan.py
SHORT = 25  # tokens: about 100 characters


def shuffled_positive(
    tokens: NDArray[np.int32], *, seed: int, epoch: int, row: int, ratio: float, before: int, after: int
) -> NDArray[np.int32]:
    """The positive of a row as it is read in an epoch.

    Args:
        tokens: of the positive, special tokens included.
        seed: the experiment's.
        epoch: from 0; another epoch, another draw.
        row: row number in the training set.
        ratio: data.shuffle_ratio, 0 to 1.
        before: special tokens at the beginning, which stay.
        after: special tokens at the end, which stay.
    """
    content = tokens[before : len(tokens) - after]
    if ratio == 0 or len(content) <= SHORT:
        return tokens
    rng = np.random.default_rng([seed, epoch, row, _SHUFFLE])
    if rng.random() >= ratio:
        return tokens
    third = len(content) // 3 + 1
    parts = [content[i : i + third] for i in range(0, len(content), third)]
    mixed = [parts[i] for i in rng.permutation(len(parts))]
    return np.concatenate([tokens[:before], *mixed, tokens[len(tokens) - after :]])
