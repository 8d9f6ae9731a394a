"""The losses by their definitions, in plain Python and float64, one query at a time."""

import math

import torch
from torch import Tensor


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def softmax(values: list[float]) -> list[float]:
    total = log_sum_exp(values)
    return [math.exp(value - total) for value in values]


def info_nce(scores: Tensor, positives: list[int], temperature: float) -> float:
    losses = []
    for row, positive in zip(scores.tolist(), positives, strict=True):
        logits = [score / temperature for score in row]
        losses.append(log_sum_exp(logits) - logits[positive])
    return math.fsum(losses) / len(losses)


def kl_div(
    scores: Tensor, positives: list[int], teacher: Tensor, temperature: float, teacher_temperature: float
) -> float:
    losses = []
    for row, start, teacher_row in zip(scores.tolist(), positives, teacher.tolist(), strict=True):
        target = softmax([score / teacher_temperature for score in teacher_row])
        own = [score / temperature for score in row[start : start + len(target)]]
        losses.append(sum(weight * (log_sum_exp(own) - logit) for weight, logit in zip(target, own, strict=True)))
    return info_nce(scores, positives, temperature) + math.fsum(losses) / len(losses)


def m3_kd_loss(
    scores: Tensor, positives: list[int], teacher: Tensor, temperature: float, teacher_temperature: float
) -> float:
    losses = []
    for row, start, teacher_row in zip(scores.tolist(), positives, teacher.tolist(), strict=True):
        target = softmax([score / teacher_temperature for score in teacher_row])
        logits = [score / temperature for score in row]
        loss: float = 0.0
        for k, weight in enumerate(target):
            competing = [logit for column, logit in enumerate(logits) if not start <= column < start + k]
            loss += weight * (log_sum_exp(competing) - logits[start + k])
        losses.append(loss)
    return math.fsum(losses) / len(losses)


def random_scores(queries: int, passages: int, seed: int) -> Tensor:
    """Like cosines: between -1 and 1."""
    return torch.rand(queries, passages, generator=torch.Generator().manual_seed(seed)) * 2 - 1
