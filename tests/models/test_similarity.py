"""Scores equal loops over tokens, whatever the padding and the blocks; nothing too big is made on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayembed.models.similarity import (
    SIMILARITIES,
    colbert_matrix,
    colbert_paired,
    compacted_sparse,
    sparse_matrix,
    weighted_sum,
)

VOCABULARY = 250_002  # of XLM-R
Texts = dict[str, Tensor]


def random_texts(lengths: list[int], *, seed: int, width: int = 5, vocabulary: int = 9, extra: int = 0) -> Texts:
    """Texts of some numbers of ColBERT vectors, padded on the right with vectors that show if they are counted."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + extra)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    weights = torch.rand(shape, generator=generator) * mask * (torch.rand(shape, generator=generator) < 0.8)
    return {
        "dense": torch.randn((len(lengths), 7), generator=generator),
        "ids": torch.randint(vocabulary, shape, generator=generator),
        "sparse": weights,
        "colbert": torch.randn((*shape, width), generator=generator),
        "mask": mask,
    }


def dense_by_hand(queries: Texts, i: int, passages: Texts, j: int) -> float:
    pairs = zip(queries["dense"][i].tolist(), passages["dense"][j].tolist(), strict=True)
    return sum((left * right for left, right in pairs), 0.0)


def sparse_by_hand(queries: Texts, i: int, passages: Texts, j: int) -> float:
    def vector(texts: Texts, row: int) -> dict[int, float]:
        ids, weights = texts["ids"][row].tolist(), texts["sparse"][row].tolist()
        return {token: max(w for t, w in zip(ids, weights, strict=True) if t == token) for token in ids}

    left, right = vector(queries, i), vector(passages, j)
    return sum(weight * right.get(token, 0) for token, weight in left.items())


def colbert_by_hand(queries: Texts, i: int, passages: Texts, j: int) -> float:
    left = queries["colbert"][i].detach()[queries["mask"][i] == 1]
    right = passages["colbert"][j].detach()[passages["mask"][j] == 1]
    return sum(max(float(a @ b) for b in right) for a in left) / len(left) if len(left) and len(right) else 0.0


BY_HAND = {"dense": dense_by_hand, "sparse": sparse_by_hand, "colbert": colbert_by_hand}


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_scores_equal_loops_over_tokens(name: str) -> None:
    queries = random_texts([4, 1, 3, 6], seed=1)
    passages = random_texts([2, 7, 1, 5, 3, 8], seed=2)
    expected = torch.tensor([[BY_HAND[name](queries, i, passages, j) for j in range(6)] for i in range(4)])
    assert float(expected.min()) < (0 if name != "sparse" else 1e-6)  # zeros of padding would show
    torch.testing.assert_close(SIMILARITIES[name].matrix(queries, passages), expected, atol=1e-6, rtol=0)
    four = {key: value[:4] for key, value in passages.items()}
    torch.testing.assert_close(SIMILARITIES[name].paired(queries, four), expected.diagonal(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_scores_do_not_depend_on_the_padding(name: str) -> None:
    queries, passages = random_texts([4, 1, 3], seed=3), random_texts([2, 7, 1], seed=4)
    wider = []
    for texts in (queries, passages):
        more = random_texts([1] * 3, seed=5, extra=8)
        added = more | {"sparse": torch.zeros(3, 9), "mask": torch.zeros(3, 9, dtype=torch.long)}
        wider.append({key: texts[key] if key == "dense" else torch.cat([texts[key], added[key]], 1) for key in texts})
    for score in (SIMILARITIES[name].matrix, SIMILARITIES[name].paired):
        torch.testing.assert_close(score(wider[0], wider[1]), score(queries, passages), atol=1e-6, rtol=0)


def test_a_text_without_tokens_scores_nothing_and_has_no_gradient() -> None:
    queries, passages = random_texts([0, 2], seed=5), random_texts([3, 0], seed=6)
    leaves = [queries["colbert"].requires_grad_(), passages["colbert"].requires_grad_()]
    paired, matrix = colbert_paired(queries, passages), colbert_matrix(queries, passages)
    assert paired.tolist() == [0, 0]
    assert matrix.flatten().tolist() == [0, 0, pytest.approx(colbert_by_hand(queries, 1, passages, 0)), 0]
    of_queries, of_passages = torch.autograd.grad(matrix.sum() + paired.sum(), leaves)
    assert bool(of_queries[0].eq(0).all())
    assert bool(of_passages[1].eq(0).all())
    assert bool(of_queries.isfinite().all())
    assert bool(of_passages.isfinite().all())


def plain_max_sim(queries: Texts, passages: Texts) -> Tensor:
    """All similarities at once, by torch's own gradient."""
    similarities = torch.einsum("qic,pjc->qpij", queries["colbert"], passages["colbert"])
    best = similarities.where(passages["mask"].bool()[None, :, None], -torch.inf).max(dim=-1).values
    return (best * queries["mask"][:, None]).sum(-1) / queries["mask"].sum(-1)[:, None]


@pytest.mark.parametrize("block_elements", [1, 7 * 9, 7 * 9 * 3, 7 * 9 * 6 * 2, 10**6])
def test_blocks_give_the_plain_scores_and_gradients(block_elements: int) -> None:
    """One pair at a time, queries in parts, passages in parts (the last one shorter), all at once."""
    queries, passages = random_texts([7, 2, 5, 1, 4, 6], seed=7), random_texts([9, 3, 1, 6, 2], seed=8)
    leaves = [queries["colbert"].requires_grad_(), passages["colbert"].requires_grad_()]
    upstream = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    expected = plain_max_sim(queries, passages)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), leaves)
    found = colbert_matrix(queries, passages, block_elements=block_elements)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for grad, expected_grad in zip(torch.autograd.grad((found * upstream).sum(), leaves), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=0)

    five = {key: value[:5] for key, value in queries.items()}
    expected_grads = torch.autograd.grad((plain_max_sim(five, passages).diagonal() * upstream[0]).sum(), leaves)
    found = colbert_paired(five, passages, block_elements=block_elements)
    torch.testing.assert_close(found, expected.diagonal(), atol=1e-6, rtol=0)
    for grad, expected_grad in zip(
        torch.autograd.grad((found * upstream[0]).sum(), leaves), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=0)


class Biggest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation gives, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


def test_sparse_scores_make_nothing_of_the_size_of_the_vocabulary() -> None:
    """FlagEmbedding makes N x T x vocabulary: here 8 TB."""
    queries = random_texts([32] * 16, seed=10, vocabulary=VOCABULARY)
    passages = random_texts([128] * 64, seed=11, vocabulary=VOCABULARY)
    passages["ids"][:, ::2] = queries["ids"].flatten()[7 * torch.arange(64 * 64).view(64, 64) % 512]  # words in common
    leaves = [queries["sparse"].requires_grad_(), passages["sparse"].requires_grad_()]
    for score in (sparse_matrix, SIMILARITIES["sparse"].paired):
        few = {key: value[:16] for key, value in passages.items()} if score is not sparse_matrix else passages
        with Biggest() as biggest:
            scores = score(queries, few)
            grads = torch.autograd.grad(scores.sum(), leaves)
        assert float(scores.detach().sum()) > 1  # so something was scored
        assert all(bool((grad != 0).any()) for grad in grads)
        assert biggest.elements <= len(passages["ids"]) * queries["ids"].numel()  # texts x the queries' tokens
        assert len(queries["ids"]) * queries["ids"].shape[1] < VOCABULARY / 400


@pytest.mark.parametrize("block", [16 * 32 * 8 * 3, 16 * 32 * 3])  # three passages, three queries of one passage
@pytest.mark.parametrize("score", [colbert_matrix, colbert_paired])
def test_max_sim_makes_one_block_at_a_time_and_holds_none(score: Callable[..., Tensor], block: int) -> None:
    queries, passages = random_texts([16] * 8, seed=12), random_texts([32] * 24, seed=13)
    if score is colbert_paired:
        queries, passages = (
            {key: torch.cat([rows] * 9)[:72] for key, rows in side.items()} for side in (queries, passages)
        )
    leaves = [queries["colbert"].requires_grad_(), passages["colbert"].requires_grad_()]
    held: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with Biggest() as biggest, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = score(queries, passages, block_elements=block)
        torch.autograd.grad(scores.sum(), leaves)
    inputs = max(leaf.numel() for leaf in leaves)
    assert scores.numel() * 16 * 32 >= 3 * max(block, inputs)  # all similarities would be too many
    assert biggest.elements <= max(block, inputs)
    assert max(held, default=0) <= inputs


@pytest.mark.parametrize("paired", [False, True])
def test_sparse_gradients_equal_those_over_the_whole_vocabulary(paired: bool) -> None:
    queries, passages = random_texts([4, 1, 3], seed=14), random_texts([2, 7, 1], seed=15)
    leaves = [queries["sparse"].requires_grad_(), passages["sparse"].requires_grad_()]
    vectors = [
        torch.zeros(*texts["ids"].shape, 9).scatter(2, texts["ids"].unsqueeze(2), texts["sparse"].unsqueeze(2)).amax(1)
        for texts in (queries, passages)
    ]
    expected = vectors[0] @ vectors[1].T
    expected = expected.diagonal() if paired else expected
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(16))
    similarity = SIMILARITIES["sparse"]
    found = similarity.paired(queries, passages) if paired else similarity.matrix(queries, passages)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for texts, grad, expected_grad in zip(
        (queries, passages),
        torch.autograd.grad((found * upstream).sum(), leaves),
        torch.autograd.grad((expected * upstream).sum(), leaves),
        strict=True,
    ):
        alive = texts["sparse"] > 0  # at 0 the two share a tie differently, and the head's relu stops both
        torch.testing.assert_close(grad[alive], expected_grad[alive], atol=1e-6, rtol=0)


def test_compacted_vectors_hold_the_highest_weight_of_each_token() -> None:
    ids = torch.tensor([[5, 200_000, 5, 0], [7, 0, 0, 0]])
    weights = torch.tensor([[0.5, 2.0, 0.75, 0.0], [1.5, 0.0, 0.0, 0.0]])
    found = compacted_sparse({"ids": ids, "sparse": weights})
    assert found.tolist() == [[0, 0.75, 0, 2.0], [0, 0, 1.5, 0]]  # tokens 0, 5, 7, 200,000


def test_the_sum_gives_each_score_its_weight() -> None:
    scores = {"dense": torch.tensor([[1.0, 2.0]]), "sparse": torch.tensor([[10.0, -10.0]])}
    weights = {"colbert": 5.0, "sparse": 0.3, "dense": 1.0}
    torch.testing.assert_close(weighted_sum(scores, weights), torch.tensor([[4.0, -1.0]]), atol=1e-6, rtol=0)
    with pytest.raises(KeyError, match="sparse"):
        weighted_sum(scores, {"dense": 1.0})
