"""The learning rate at each step: transformers' values, without the seconds that its own functions take to import.

To add one: a function of step, warm-up and all steps, a row in AFTER_WARMUP, and its name in train.lr_scheduler_type.
"""

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rayembed.config.train import TrainConfig

POLYNOMIAL_END = 1e-7  # the learning rate where it ends, as in transformers
Factor = Callable[[int, int, int, float], float]


def schedule(optimizer: Optimizer, train: TrainConfig, *, total_steps: int) -> LambdaLR:
    """The schedule of an optimiser's learning rates, which is moved on by `step` and resumes from its state_dict.

    Args:
        optimizer: its learning rates are the peak.
        train: kind of schedule and warm-up.
        total_steps: steps of the optimiser.
    """
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total_steps)
    return LambdaLR(optimizer, partial(factor, train, warmup=warmup, total_steps=total_steps))


def factor(train: TrainConfig, step: int, *, warmup: int, total_steps: int) -> float:
    """The share of the peak learning rate, 0 to 1, at a step from 0.

    Args:
        train: kind of schedule and peak.
        step: steps done.
        warmup: steps over which the rate rises from 0; more than `total_steps` are allowed.
        total_steps: of the training.
    """
    if step < warmup and train.lr_scheduler_type != "constant":
        return step / warmup
    return AFTER_WARMUP[train.lr_scheduler_type](step, warmup, total_steps, train.learning_rate)


def _constant(_step: int, _warmup: int, _total: int, _peak: float) -> float:
    return 1.0


def _linear(step: int, warmup: int, total: int, _peak: float) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int, _peak: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, total - warmup)))))


def _polynomial(step: int, warmup: int, total: int, peak: float) -> float:
    """Of the first power: linear, but to POLYNOMIAL_END."""
    end = min(POLYNOMIAL_END, peak)
    if step >= total:
        return end / peak
    return ((peak - end) * (1 - (step - warmup) / (total - warmup)) + end) / peak


AFTER_WARMUP: dict[str, Factor] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "polynomial": _polynomial,
}
