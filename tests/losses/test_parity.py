"""The same values and gradients as sentence-transformers' losses and FlagEmbedding's Matryoshka."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as peers
from sentence_transformers.sparse_encoder.losses import FlopsLoss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rayembed.losses import (
    FourWays,
    angle,
    beginnings,
    by_margin,
    cosent,
    flops,
    improved_info_nce,
    info_nce,
    margin_mse,
    symmetric_info_nce,
    up_to,
)

pytestmark = pytest.mark.parity

SIZE, SCALE = 4, 10.0
ROWS = torch.arange(SIZE)


def columns(count: int, width: int = 6) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and the columns of a batch that are made of them by scaling to length 1."""
    draw = torch.Generator().manual_seed(count)
    leaves = [torch.randn(SIZE, width, generator=draw).requires_grad_() for _ in range(count)]
    return leaves, [F.normalize(leaf, dim=-1) for leaf in leaves]


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    pairs = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    for grad, expected in zip(*pairs, strict=True):
        assert expected.abs().max() > 1e-3, "too small to compare"
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("negatives", [0, 2])
def test_symmetric_info_nce(negatives: int) -> None:
    leaves, parts = columns(2 + negatives)
    peer = peers.MultipleNegativesRankingLoss(
        nn.Identity(), SCALE, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    passages = torch.stack(parts[1:], dim=1).flatten(0, 1)
    ours = symmetric_info_nce(
        parts[0] @ passages.T, ROWS * (1 + negatives), parts[1] @ parts[0].T, ROWS, temperature=1 / SCALE
    )
    assert_equal(ours, peer.compute_loss_from_embeddings(parts, torch.zeros(0)), leaves)


@pytest.mark.parametrize("negatives", [0, 2])
def test_improved_info_nce_but_for_the_positive_that_theirs_counts_twice(negatives: int) -> None:
    leaves, parts = columns(2 + negatives)
    peer = peers.MultipleNegativesRankingLoss(
        nn.Identity(), SCALE, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    )
    queries, positives = parts[:2]
    passages = torch.stack(parts[1:], dim=1).flatten(0, 1)
    again = (queries * positives).sum(dim=1, keepdim=True)  # each positive as one more passage
    ours = improved_info_nce(
        FourWays(
            torch.cat([queries @ passages.T, again], dim=1),
            queries @ queries.T,
            positives @ queries.T,
            positives @ passages.T,
        ),
        ROWS * (1 + negatives),
        ROWS,
        temperature=1 / SCALE,
        group_size=1 + negatives,
    )
    assert_equal(ours, peer.compute_loss_from_embeddings(parts, torch.zeros(0)), leaves)


class Given(nn.Module):
    """In the place of a model: its vectors are among the features."""

    max_seq_length = 8

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("improved", [False, True])
def test_guided_masks_are_gist_embeds(margin: float, improved: bool) -> None:
    leaves, (queries, passages) = columns(2)
    _, (_, _, guide_queries, guide_passages) = columns(4)
    peer = peers.GISTEmbedLoss(
        Given("own"), Given("guide"), 1 / SCALE, margin=margin, contrast_anchors=improved, contrast_positives=improved
    )
    theirs = peer(
        [{"own": queries, "guide": guide_queries}, {"own": passages, "guide": guide_passages}], torch.zeros(0)
    )
    scores, guide_scores = queries @ passages.T, guide_queries @ guide_passages.T
    allowed = by_margin(guide_scores, ROWS, 1, -margin)
    assert 0 < (~allowed).sum() < allowed.numel() - SIZE
    if not improved:
        ours = info_nce(scores, ROWS, temperature=1 / SCALE, allowed=allowed)
    else:
        ceilings = guide_scores.diagonal() - margin
        same_kind = [up_to(texts @ texts.T, ceilings) for texts in (guide_queries, guide_passages)]
        ours = improved_info_nce(
            FourWays(scores, queries @ queries.T, passages @ queries.T, passages @ passages.T),
            ROWS,
            ROWS,
            temperature=1 / SCALE,
            group_size=1,
            allowed=FourWays(allowed, same_kind[0], torch.zeros_like(allowed), same_kind[1]),
        )
    assert_equal(ours, theirs, leaves)


@pytest.mark.parametrize("labels", [[0.1, 0.8, 0.4, 0.6], [1.0, 0.0, 1.0, 0.5]])
def test_cosent(labels: list[float]) -> None:
    leaves, parts = columns(2)
    theirs = peers.CoSENTLoss(nn.Identity(), SCALE).compute_loss_from_embeddings(parts, torch.tensor(labels))
    assert_equal(cosent((parts[0] * parts[1]).sum(dim=1), torch.tensor(labels), temperature=1 / SCALE), theirs, leaves)


@pytest.mark.parametrize("width", [6, 7])
def test_angle(width: int) -> None:
    leaves, _ = columns(2, width)
    labels = torch.tensor([0.1, 0.8, 0.4, 0.8])
    theirs = peers.AnglELoss(nn.Identity(), SCALE).compute_loss_from_embeddings(leaves, labels)
    assert_equal(angle(*leaves, labels, temperature=1 / SCALE), theirs, leaves)


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse(negatives: int) -> None:
    leaves, parts = columns(2 + negatives)
    teacher = torch.randn(SIZE, 1 + negatives, generator=torch.Generator().manual_seed(1))
    scores = torch.stack([(parts[0] * part).sum(dim=1) for part in parts[1:]], dim=1)
    theirs = peers.MarginMSELoss(nn.Identity()).compute_loss_from_embeddings(parts, teacher)
    assert_equal(margin_mse(scores, torch.zeros(SIZE).long(), teacher, temperature=1.0), theirs, leaves)


def test_flops() -> None:
    weights = torch.rand(SIZE, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert_equal(flops(weights), FlopsLoss(nn.Identity()).compute_loss_from_embeddings(weights), [weights])


@pytest.mark.parametrize("normalize", [False, True])
def test_beginnings_are_flag_embeddings(normalize: bool) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel

    class Hidden(nn.Module):
        def forward(self, vectors: Tensor, attention_mask: Tensor, return_dict: bool) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=vectors.unsqueeze(1))

    dims = [2, 3, 6]
    peer = BiEncoderOnlyEmbedderModel(Hidden(), use_mrl=True, mrl_dims=dims, normalize_embeddings=normalize)
    (vectors, _), _ = columns(2)
    theirs = peer.encode({"vectors": vectors, "attention_mask": torch.ones(SIZE, 1).long()})
    for ours, expected in zip(beginnings(vectors, dims, normalize=normalize), theirs, strict=True):
        torch.testing.assert_close(ours, expected)
