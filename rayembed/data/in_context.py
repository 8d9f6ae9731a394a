"""In-context examples of training: which rows of a batch are read before a query, a pure function of the seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayembed.config.families import IclConfig
from rayembed.data.tasks import CLASS, STS

_EXAMPLES = 5  # stream of random numbers; plan.py has 0 and 1, mixing.py 2, labels.py 3, shuffle.py 4
SPARE = 2  # rows drawn for each example wanted: some give the answer away and are passed over


def have_examples(icl: IclConfig, row_type: str | None) -> bool:
    """Whether queries of a type are read after examples. Scored pairs never are: a score is no answer."""
    kind = row_type or "normal"
    return kind != STS and (icl.retrieval_use_examples or kind == CLASS or kind.startswith("symmetric_"))


def draw_examples(
    seed: int, epoch: int, row: int, *, batch: Sequence[int] | NDArray[np.int64], most: int
) -> tuple[int, list[int]]:
    """How many examples a row's query is to have in an epoch, and which rows of its batch may be them, in order.

    Args:
        seed: the experiment's.
        epoch: from 0; another epoch, another choice.
        row: number of the row.
        batch: rows of the batch over all workers, the row itself among them.
        most: 0 to this many examples, each number as likely.

    Returns:
        The number of examples wanted, and more different rows than that, if there are; never the row itself.

    Source: FlagEmbedding's rule, which draws from the rows of one worker.
    """
    rng = np.random.default_rng([seed, epoch, row, _EXAMPLES])
    wanted = int(rng.integers(most + 1))
    others = np.asarray(batch, np.int64)
    others = others[others != row]
    if not len(others):
        return wanted, []
    return wanted, rng.choice(others, min(SPARE * wanted, len(others)), replace=False).tolist()
