"""The losses by their definitions, in plain Python and float64, one query at a time.

Those of plain numbers come first. Those below take float64 tensors and keep gradients: every sum is written out.
"""

import math
from collections.abc import Callable, Sequence

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


Mask = Sequence[Sequence[bool]]


def assert_same(
    ours: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """The same value and gradients; ours in float32, the expected ones in float64."""
    found = []
    for function, dtype in ((ours, torch.float32), (expected, torch.float64)):
        leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
        loss = function(*leaves)
        found.append((loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)))
    (loss, grads), (expected_loss, expected_grads) = found
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, atol=tolerance, rtol=tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, atol=tolerance, rtol=tolerance)


def log_sum(logits: list[Tensor]) -> Tensor:
    return torch.stack([logit.exp() for logit in logits]).sum().log()


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum() / len(losses)


def masked_info_nce(scores: Tensor, positives: list[int], temperature: float, allowed: Mask) -> Tensor:
    losses = []
    for row, positive, may in zip(scores / temperature, positives, allowed, strict=True):
        losses.append(log_sum([row[j] for j in range(len(row)) if may[j] or j == positive]) - row[positive])
    return mean(losses)


def with_groups(allowed: Mask, positives: list[int], group: int) -> list[list[bool]]:
    return [
        [may or start <= column < start + group for column, may in enumerate(row)]
        for row, start in zip(allowed, positives, strict=True)
    ]


def masked_kl_div(scores: Tensor, positives: list[int], teacher: Tensor, temperature: float, allowed: Mask) -> Tensor:
    group, losses = teacher.shape[1], []
    for row, start, judged in zip(scores / temperature, positives, teacher, strict=True):
        own = [row[start + k] for k in range(group)]
        losses.append(sum(judged[k].exp() / judged.exp().sum() * (log_sum(own) - own[k]) for k in range(group)))
    return masked_info_nce(scores, positives, temperature, with_groups(allowed, positives, group)) + mean(losses)


def masked_m3_kd_loss(
    scores: Tensor, positives: list[int], teacher: Tensor, temperature: float, allowed: Mask
) -> Tensor:
    group, losses = teacher.shape[1], []
    allowed = with_groups(allowed, positives, group)
    for row, start, judged, may in zip(scores / temperature, positives, teacher, allowed, strict=True):
        loss = torch.zeros((), dtype=row.dtype)
        for k in range(group):
            left = [row[j] for j in range(len(row)) if may[j] and not start <= j < start + k]
            loss = loss + judged[k].exp() / judged.exp().sum() * (log_sum(left) - row[start + k])
        losses.append(loss)
    return mean(losses)


def margin_mse(scores: Tensor, positives: list[int], teacher: Tensor) -> Tensor:
    errors = []
    for row, start, judged in zip(scores, positives, teacher, strict=True):
        for k in range(1, len(judged)):
            errors.append(((row[start] - row[start + k]) - (judged[0] - judged[k])) ** 2)
    return mean(errors)


def improved_info_nce(
    queries: Tensor, passages: Tensor, group: int, temperature: float, own: Sequence[int], may: Sequence[Mask]
) -> Tensor:
    """From vectors; `may` is of query-passage, query-query, passage-query, passage-passage."""
    losses = []
    for row, i in enumerate(own):
        query, positive = queries[i], passages[i * group]
        true = query @ positive / temperature
        rest = []
        for j, other in enumerate(passages):
            if j != i * group and may[0][row][j]:
                rest.append(query @ other / temperature)
            if j // group != i and may[3][row][j]:
                rest.append(positive @ other / temperature)
        for j, other in enumerate(queries):
            if j != i and may[1][row][j]:
                rest.append(query @ other / temperature)
            if j != i and may[2][row][j]:
                rest.append(positive @ other / temperature)
        losses.append(log_sum([true, *rest]) - true)
    return mean(losses)


def cosent(scores: Tensor, labels: list[float], temperature: float) -> Tensor:
    terms = [scores.sum() * 0]
    for i, label in enumerate(labels):
        terms += [(scores[j] - scores[i]) / temperature for j, lower in enumerate(labels) if label > lower]
    return log_sum(terms)


def angle_similarity(x: Tensor, y: Tensor) -> Tensor:
    """By complex numbers."""
    similarities = []
    for first, second in zip(x, y, strict=True):
        half = (len(first) + 1) // 2
        total = torch.zeros((), dtype=torch.complex128)
        for k in range(half):
            pair = [torch.complex(v[k], v[half + k] if half + k < len(v) else v.new_zeros(())) for v in (first, second)]
            total = total + pair[0] * pair[1].conj()
        total = total / (first.norm() * second.norm())
        similarities.append((total.real + total.imag).abs())
    return torch.stack(similarities)


def cross_entropy(scores: Tensor, teacher: Tensor, temperature: float, allowed: Mask) -> Tensor:
    """To the teacher's softmax, over what is allowed; no gradient through the teacher."""
    losses = []
    for row, target, may in zip(scores / temperature, teacher.detach() / temperature, allowed, strict=True):
        columns = [j for j in range(len(row)) if may[j]]
        weights = [(target[j] - log_sum([target[k] for k in columns])).exp() for j in columns]
        logs = [row[j] - log_sum([row[k] for k in columns]) for j in columns]
        losses.append(-sum(weight * log for weight, log in zip(weights, logs, strict=True)))
    return mean(losses)


def random_mask(rows: int, columns: int, seed: int) -> Tensor:
    """About half of it True."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
