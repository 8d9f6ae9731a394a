"""The distillation losses are their definitions, and FlagEmbedding's on the same tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rayembed.losses import KD_LOSSES, info_nce, kl_div, margin_mse
from tests.losses import reference

REFERENCES: dict[str, Callable[..., float]] = {"kl_div": reference.kl_div, "m3_kd_loss": reference.m3_kd_loss}
SIZES = [(1, 1), (1, 4), (3, 2), (5, 4)]
TEMPERATURES = [0.02, 0.5]


def example(queries: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with each query's own group anywhere, its positives' columns, and a teacher that disagrees."""
    scores = reference.random_scores(queries, queries * group + 3, seed=group)
    positives = torch.arange(queries) * group + 2  # not at 0: cross-device groups begin elsewhere
    return scores, positives, reference.random_scores(queries, group, seed=7) * 3


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("queries", "group"), SIZES)
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.02, 1.0), (1.0, 0.25)])
def test_distillation_is_its_definition(
    name: str, queries: int, group: int, temperature: float, teacher_temperature: float
) -> None:
    scores, positives, teacher = example(queries, group)
    loss = KD_LOSSES[name](scores, positives, teacher, temperature=temperature, teacher_temperature=teacher_temperature)
    expected = REFERENCES[name](scores, positives.tolist(), teacher, temperature, teacher_temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_gradient_is_the_slope_of_the_definition(name: str) -> None:
    scores, positives, teacher = example(2, 3)
    given = scores.clone().requires_grad_()
    KD_LOSSES[name](given, positives, teacher, temperature=0.5, teacher_temperature=2.0).backward()
    assert given.grad is not None
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(scores.shape[1])).tolist():
        ends = []
        for change in (-1e-4, 1e-4):
            moved = scores.double()
            moved[row, column] += change
            ends.append(REFERENCES[name](moved, positives.tolist(), teacher, 0.5, 2.0))
        assert given.grad[row, column].item() == pytest.approx((ends[1] - ends[0]) / 2e-4, abs=1e-5)


def test_a_teacher_sure_of_the_positive_adds_the_groups_own_info_nce() -> None:
    scores, positives, _ = example(3, 4)
    teacher = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    own = torch.stack([scores[i, start : start + 4] for i, start in enumerate(positives.tolist())])
    expected = info_nce(scores, positives, temperature=0.1) + info_nce(own, torch.zeros(3).long(), temperature=0.1)
    torch.testing.assert_close(kl_div(scores, positives, teacher, temperature=0.1), expected)


@pytest.mark.parametrize("name", REFERENCES)
def test_masked_passages_are_left_out_and_those_of_the_own_group_never(name: str) -> None:
    scores, positives, teacher = example(3, 4)
    allowed = reference.random_mask(3, scores.shape[1], seed=5)
    allowed[0] = False  # query 0 has its group alone
    allowed[1, positives[1]] = allowed[2, positives[2] + 1] = False
    expected = {"kl_div": reference.masked_kl_div, "m3_kd_loss": reference.masked_m3_kd_loss}[name]
    reference.assert_same(
        lambda s: KD_LOSSES[name](s, positives, teacher, temperature=0.3, allowed=allowed),
        lambda s: expected(s, positives.tolist(), teacher.double(), 0.3, allowed.tolist()),
        scores,
    )


def test_margin_mse_is_its_definition_whatever_is_masked_and_at_any_temperature() -> None:
    scores, positives, teacher = example(3, 4)
    rest: dict[str, Any] = {
        "temperature": 0.02,
        "teacher_temperature": 0.5,
        "allowed": torch.zeros(3, scores.shape[1]).bool(),
    }
    reference.assert_same(
        lambda s: margin_mse(s, positives, teacher, **rest),
        lambda s: reference.margin_mse(s, positives.tolist(), teacher.double()),
        scores,
    )


def test_margin_mse_of_groups_without_a_negative_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups hold 1 passage; set data\.train_group_size to 2 or more"):
        margin_mse(torch.zeros(2, 2), torch.arange(2), torch.zeros(2, 1), temperature=1.0)


def judged(queries: Tensor, passages: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """The loss and what it says about queries and passages."""
    leaves = [queries.clone().requires_grad_(), passages.clone().requires_grad_()]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["info_nce", *REFERENCES])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize(("queries", "group"), [(1, 4), (3, 2), (6, 5)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_losses_equal_flag_embeddings(kind: str, in_batch: bool, queries: int, group: int, temperature: float) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel

    if kind == "m3_kd_loss" and not in_batch and queries > 1:
        queries = 1  # FlagEmbedding's raises IndexError above one query
    peer = BiEncoderOnlyEmbedderModel(torch.nn.Identity(), temperature=temperature, kd_loss_type=kind)
    torch.manual_seed(queries)
    vectors = torch.nn.functional.normalize(torch.randn(queries * (group + 1), 8), dim=-1)
    teacher = None if kind == "info_nce" else torch.randn(queries, group) * 3

    def theirs(q: Tensor, p: Tensor) -> Tensor:
        target = None if teacher is None else torch.softmax(teacher, dim=-1)
        compute = peer._compute_in_batch_neg_loss if in_batch else peer._compute_no_in_batch_neg_loss
        loss: Tensor = compute(q, p, teacher_targets=target)[1]
        return loss

    def ours(q: Tensor, p: Tensor) -> Tensor:
        own = torch.einsum("qd,qgd->qg", q, p.view(queries, group, -1))
        scores = q @ p.T if in_batch else own
        positives = torch.arange(queries) * group if in_batch else torch.zeros(queries).long()
        if teacher is None:
            return info_nce(scores, positives, temperature=temperature)
        return KD_LOSSES[kind](scores, positives, teacher, temperature=temperature)

    parts = vectors.split([queries, queries * group])
    (loss, *grads), (their_loss, *their_grads) = judged(*parts, ours), judged(*parts, theirs)
    torch.testing.assert_close(loss, their_loss, atol=1e-6, rtol=1e-6)
    for grad, their_grad in zip(grads, their_grads, strict=True):  # gradients grow with 1 / temperature
        torch.testing.assert_close(grad * temperature, their_grad * temperature, atol=1e-6, rtol=1e-6)
