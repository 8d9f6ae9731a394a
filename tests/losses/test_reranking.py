"""Pointwise cross-entropy is its definition; the listwise losses are FlagEmbedding's of rerankers."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rayembed.losses import info_nce, kl_div, pointwise_bce
from tests.losses import reference


def expected(scores: Tensor, labels: Tensor, temperature: float) -> Tensor:
    losses = []
    for row, targets in zip(scores, labels, strict=True):
        for score, label in zip(row, targets, strict=True):
            chance = 1 / (1 + (-score / temperature).exp())
            losses.append(-(label * chance.log() + (1 - label) * (1 - chance).log()))
    return reference.mean(losses)


def test_the_positive_is_relevant_and_no_other() -> None:
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    reference.assert_same(
        lambda s: pointwise_bce(s, torch.tensor([0, 2]), temperature=0.7),
        lambda s: expected(s, labels.double(), 0.7),
        reference.random_scores(2, 3, seed=1) * 4,
    )


def test_a_teachers_chances_are_the_labels() -> None:
    teacher = reference.random_scores(2, 3, seed=2) * 6
    reference.assert_same(
        lambda s: pointwise_bce(s, torch.zeros(2).long(), teacher, temperature=1.0, teacher_temperature=2.0),
        lambda s: expected(s, 1 / (1 + (-teacher.double() / 2).exp()), 1.0),
        reference.random_scores(2, 3, seed=1) * 4,
    )


def test_half_precision_logits_are_judged_in_float32() -> None:
    scores = torch.tensor([[3.0, -3.0]], dtype=torch.bfloat16)
    loss = pointwise_bce(scores, torch.tensor([0]), temperature=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(torch.tensor(-3.0))).item(), rel=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("taught", [False, True])
def test_listwise_losses_equal_flag_embeddings(taught: bool) -> None:
    from FlagEmbedding.finetune.reranker.encoder_only.base import CrossEncoderModel

    class Logits(torch.nn.Module):
        config = SimpleNamespace(pad_token_id=0)

        def forward(self, logits: Tensor, return_dict: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=logits)

    def tokenizer(_: str, **__: object) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    scores, teacher = reference.random_scores(3, 4, seed=3) * 5, reference.random_scores(3, 4, seed=4) * 5
    peer = CrossEncoderModel(Logits(), tokenizer=tokenizer, train_batch_size=3).train()
    theirs = peer(pair={"logits": scores.view(-1, 1)}, teacher_scores=teacher.flatten().tolist() if taught else None)
    first = torch.zeros(3).long()
    ours = kl_div(scores, first, teacher, temperature=1.0) if taught else info_nce(scores, first, temperature=1.0)
    torch.testing.assert_close(ours, theirs.loss, atol=1e-6, rtol=1e-6)
