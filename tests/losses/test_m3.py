"""BGE-M3's loss is its definition, with and without masks, and FlagEmbedding's on the same scores."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayembed.losses import KD_LOSSES, info_nce, m3_loss
from tests.losses import reference

HEADS = ("dense", "sparse", "colbert")
WEIGHTS: dict[str, Any] = {"sparse_score_weight": 0.3, "sparse_loss_weight": 0.1}


def head_scores(rows: int, columns: int) -> list[Tensor]:
    return [reference.random_scores(rows, columns, seed) * scale for seed, scale in enumerate((1, 3, 1))]


def expected(
    scores: tuple[Tensor, ...], positives: list[int], temperature: float, distill: bool, may: reference.Mask
) -> Tensor:
    dense, sparse, colbert = scores
    together = torch.zeros_like(dense)
    for i in range(len(dense)):
        for j in range(dense.shape[1]):
            together[i, j] = dense[i, j] + 0.3 * sparse[i, j] + colbert[i, j]
    four = [reference.masked_info_nce(part, positives, temperature, may) for part in (dense, together, sparse, colbert)]
    loss = (four[0] + four[1] + 0.1 * four[2] + four[3]) / 4
    if not distill:
        return loss
    three = [reference.cross_entropy(part, together, temperature, may) for part in scores]
    return (loss + (three[0] + 0.1 * three[1] + three[2]) / 3) / 2


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("columns", "positives"), [(6, [0, 2, 4]), (2, [0, 0, 0])], ids=["in batch", "own group's, more queries than group"]
)
def test_m3_loss_is_its_definition(distill: bool, masked: bool, columns: int, positives: list[int]) -> None:
    allowed = reference.random_mask(3, columns, seed=9) | (not masked)
    for i, start in enumerate(positives):
        allowed[i, start : start + 2] = True
    allowed[0] &= torch.arange(columns) < 2  # nothing but its own group

    def ours(*scores: Tensor) -> Tensor:
        def loss(one: Tensor) -> Tensor:
            return info_nce(one, torch.tensor(positives), temperature=0.5, allowed=allowed)

        heads = dict(zip(HEADS, scores, strict=True))
        return m3_loss(heads, loss, temperature=0.5, self_distill=distill, allowed=allowed, **WEIGHTS)

    reference.assert_same(
        ours,
        lambda *scores: expected(scores, positives, 0.5, distill, allowed.tolist()),
        *head_scores(3, columns),
    )


def test_without_a_mask_every_passage_is_distilled() -> None:
    scores = dict(zip(HEADS, head_scores(3, 6), strict=True))
    settings: dict[str, Any] = {"temperature": 0.2, "self_distill": True, **WEIGHTS}
    everything = torch.ones(3, 6, dtype=torch.bool)
    losses = [m3_loss(scores, torch.sum, allowed=allowed, **settings) for allowed in (None, everything)]
    torch.testing.assert_close(*losses)


def test_equal_scores_of_a_group_give_logs_of_its_size_and_not_0() -> None:
    """FlagEmbedding 1.4.2 gives an ensemble loss of 0 here."""
    scores = {head: torch.zeros(3, 4) for head in HEADS}

    def loss(one: Tensor) -> Tensor:
        return info_nce(one, torch.zeros(3).long(), temperature=1.0)

    found = m3_loss(scores, loss, temperature=1.0, self_distill=True, **WEIGHTS)
    assert found.item() == pytest.approx((3.1 / 4 + 2.1 / 3) / 2 * math.log(4))


def test_dense_alone_is_its_own_loss_and_a_given_one_takes_its_place() -> None:
    scores = dict(zip(HEADS, head_scores(2, 4), strict=True))
    settings: dict[str, Any] = {"temperature": 0.2, "self_distill": True, **WEIGHTS}
    alone = {"dense": scores["dense"]}
    assert m3_loss(alone, torch.sum, **settings) == scores["dense"].sum()
    assert m3_loss(alone, torch.sum, dense_loss=torch.tensor(5.0), **settings) == 5
    usual = m3_loss(scores, torch.sum, **settings)
    more = m3_loss(scores, torch.sum, dense_loss=scores["dense"].sum() + 16, **settings)
    torch.testing.assert_close(more, usual + 16 / 4 / 2)


def test_other_heads_are_refused() -> None:
    scores = {"dense": torch.zeros(1, 1), "sparse": torch.zeros(1, 1)}
    with pytest.raises(AssertionError, match="heads"):
        m3_loss(scores, torch.sum, temperature=1.0, self_distill=False, **WEIGHTS)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["info_nce", "kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_m3_loss_equals_flag_embeddings(kind: str, distill: bool, temperature: float) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import EncoderOnlyEmbedderM3Model

    queries, group = 3, 2
    encoder = torch.nn.Identity()
    encoder.config = SimpleNamespace(vocab_size=7)
    peer = EncoderOnlyEmbedderM3Model(
        {"model": encoder, "colbert_linear": torch.nn.Identity(), "sparse_linear": torch.nn.Identity()},
        temperature=temperature,
        kd_loss_type="kl_div" if kind == "info_nce" else kind,
        use_self_distill=distill,
    ).train()
    peer.encode = lambda features: features["vectors"]
    torch.manual_seed(queries)
    dense = F.normalize(torch.randn(queries * (group + 1), 5), dim=-1).requires_grad_()
    sparse = torch.rand(queries * (group + 1), 7).requires_grad_()
    colbert = F.normalize(torch.randn(queries * (group + 1), 4, 5), dim=-1).requires_grad_()
    leaves = [dense, sparse, colbert]
    split = [[*leaf.split([queries, queries * group])] for leaf in leaves]
    teacher = None if kind == "info_nce" else torch.randn(queries, group) * 3
    theirs = peer(
        queries={"vectors": [q for q, _ in split], "attention_mask": torch.ones(queries, 5)},
        passages={"vectors": [p for _, p in split]},
        teacher_scores=None if teacher is None else teacher.flatten().tolist(),
    ).loss

    def loss(scores: Tensor) -> Tensor:
        positives = torch.arange(queries) * group
        if teacher is None:
            return info_nce(scores, positives, temperature=temperature)
        return KD_LOSSES[kind](scores, positives, teacher, temperature=temperature)

    (q, p), (q_sparse, p_sparse), (q_colbert, p_colbert) = split
    late = torch.einsum("qid,pjd->qpij", q_colbert, p_colbert).amax(dim=3).mean(dim=2)
    heads = {"dense": q @ p.T, "sparse": q_sparse @ p_sparse.T, "colbert": late}
    ours = m3_loss(heads, loss, temperature=temperature, self_distill=distill, **WEIGHTS)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for grad, their_grad in pairs:  # gradients grow with 1 / temperature
        torch.testing.assert_close(grad * temperature, their_grad * temperature, atol=1e-6, rtol=1e-5)
