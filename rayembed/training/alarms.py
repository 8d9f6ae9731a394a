"""What a run should not look like: each is a line of the log, at most every 100 steps, and a name in metrics.jsonl."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rayembed.data.datasets import Dataset
from rayembed.data.tasks import STS

EVERY = 100  # steps between two lines about the same
SPIKE, NORMS, FEWEST_NORMS = 10.0, 100, 10
ALIKE = 1e-4  # standard deviation of scores below which all texts are one to the model
TEXTS = 64  # of each side whose scores are looked at


class Alarms:
    """Remembers the last gradient norms, and when each alarm was last told."""

    def __init__(self) -> None:
        """Begins without norms, also where a run goes on."""
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._told: dict[str, int] = {}

    def raised(self, figures: dict[str, float], *, spread: float | None, dataset: Dataset) -> list[str]:
        """Names of what is wrong with a step; those not told in the last 100 steps are told in the log.

        Args:
            figures: step, loss, grad_norm, negatives_per_query.
            spread: standard deviation of the scores. None: not looked at in this step.
            dataset: of the batch.
        """
        found, step = self._found(figures, spread, dataset), int(figures["step"])
        for name, text in found.items():
            if step - self._told.get(name, -EVERY) >= EVERY:
                self._told[name] = step
                logging.getLogger("rayembed").warning("train: step %d: %s", step, text)
        return list(found)

    def _found(self, figures: dict[str, float], spread: float | None, dataset: Dataset) -> dict[str, str]:
        norm, median = figures["grad_norm"], statistics.median(self._norms or [0.0])
        found = {}
        if figures["loss"] == 0:
            found["zero_loss"] = "the loss is exactly 0: nothing is learned; look at the rows, and at train.temperature"
        if spread is not None and spread < ALIKE:
            found["score_collapse"] = (
                f"all scores of the batch are alike (standard deviation {spread:.1e}): to the model all texts are one; "
                "lower train.learning_rate, or look at model.pooling"
            )
        if len(self._norms) >= FEWEST_NORMS and norm > SPIKE * median:
            found["grad_norm_spike"] = (
                f"the gradient norm is {norm:.3g}; the median of the last {len(self._norms)} steps is {median:.3g}; "
                "train.max_grad_norm bounds it"
            )
        contrastive = dataset.type != STS and dataset.loss != "pointwise_bce"
        if contrastive and figures["negatives_per_query"] == 0:
            found["no_negatives"] = (
                "queries have no negatives: raise the batch size or data.train_group_size, or set "
                "train.no_in_batch_neg to false"
            )
        self._norms.append(norm)
        return found


class Judge:
    """A batch's loss of what the model gives, which also lets its scores be looked at."""

    def __init__(self, loss_of: Callable[[Sequence[Any]], Tensor]) -> None:
        """Takes the loss."""
        self._loss_of = loss_of
        self._spread: Tensor | None = None

    def __call__(self, outputs: Sequence[Any]) -> Tensor:
        """The loss."""
        self._spread = score_spread(outputs)
        return self._loss_of(outputs)

    def spread(self) -> float | None:
        """Standard deviation of the scores, fetched from the device; None where there is none."""
        found = None if self._spread is None else float(self._spread)
        return None if found is None or math.isnan(found) else found


@torch.no_grad()
def score_spread(outputs: Sequence[Any]) -> Tensor:
    """Standard deviation of the scores between the first texts of this worker's batch; NaN where there is one score.

    Args:
        outputs: what the model gives for queries and passages, or of a reranker the scores of pairs.
    """
    sides = [side if isinstance(side, Tensor) else side["dense"] for side in outputs]
    scores = sides[0] if len(sides) == 1 else sides[0][:TEXTS].float() @ sides[1][:TEXTS].float().T
    return scores.float().std() if scores.numel() > 1 else torch.tensor(torch.nan)
