"""W ranks, simulated: the mean of their losses and gradients is that of one process on the global batch."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayembed.losses import (
    KD_LOSSES,
    FourWays,
    angle,
    by_margin,
    cosent,
    flops,
    improved_info_nce,
    info_nce,
    m3_loss,
    pointwise_bce,
    symmetric_info_nce,
)

QUERIES, GROUP = 4, 2
DRAW = torch.Generator().manual_seed(0)
TEXTS = {
    "queries": torch.randn(QUERIES, 6, generator=DRAW),
    "passages": torch.randn(QUERIES * GROUP, 6, generator=DRAW),
}
TEACHER = torch.randn(QUERIES, GROUP, generator=DRAW) * 2
LABELS = torch.tensor([0.2, 0.9, 0.9, 0.5])
TEMPERATURE = 0.2


class Rank(NamedTuple):
    rows: Tensor  # which queries are its own
    queries: Tensor  # their vectors
    gathered_queries: Tensor
    gathered_passages: Tensor

    def scores(self) -> tuple[Tensor, Tensor]:
        return self.queries @ self.gathered_passages.T, self.rows * GROUP

    def allowed(self) -> Tensor:
        allowed = by_margin(*self.scores(), GROUP, 0.1)
        return allowed | (torch.arange(QUERIES * GROUP) == 0)


def symmetric(rank: Rank) -> Tensor:
    scores, positives = rank.scores()
    reverse = rank.gathered_passages[positives] @ rank.gathered_queries.T
    return symmetric_info_nce(scores, positives, reverse, rank.rows, temperature=TEMPERATURE, allowed=rank.allowed())


def improved(rank: Rank) -> Tensor:
    scores, positives = rank.scores()
    own, queries, passages = rank.gathered_passages[positives], rank.gathered_queries, rank.gathered_passages
    ways = FourWays(scores, rank.queries @ queries.T, own @ queries.T, own @ passages.T)
    return improved_info_nce(ways, positives, rank.rows, temperature=TEMPERATURE, group_size=GROUP)


def m3(rank: Rank) -> Tensor:
    dense, positives = rank.scores()
    sparse = torch.relu(rank.queries) @ torch.relu(rank.gathered_passages).T
    return m3_loss(
        {"dense": dense, "sparse": sparse, "colbert": torch.tanh(dense * 2)},
        lambda scores: info_nce(scores, positives, temperature=TEMPERATURE, allowed=rank.allowed()),
        temperature=TEMPERATURE,
        sparse_score_weight=0.3,
        sparse_loss_weight=0.1,
        self_distill=True,
        allowed=rank.allowed(),
    )


def distillation(name: str) -> Callable[[Rank], Tensor]:
    return lambda rank: KD_LOSSES[name](
        *rank.scores(), TEACHER[rank.rows], temperature=TEMPERATURE, allowed=rank.allowed()
    )


def pointwise(rank: Rank) -> Tensor:
    groups = rank.gathered_passages.view(QUERIES, GROUP, -1)[rank.rows]
    scores = (rank.queries.unsqueeze(1) * groups).sum(dim=-1)
    return pointwise_bce(scores, torch.zeros(len(scores)).long(), TEACHER[rank.rows], temperature=TEMPERATURE)


def by_angle(rank: Rank) -> Tensor:
    return angle(rank.gathered_queries, rank.gathered_passages[::GROUP], LABELS, temperature=TEMPERATURE)


def by_cosine(rank: Rank) -> Tensor:
    scores = F.cosine_similarity(rank.gathered_queries, rank.gathered_passages[::GROUP])
    return cosent(scores, LABELS, temperature=TEMPERATURE)


LOSSES: dict[str, Callable[[Rank], Tensor]] = {
    "info_nce": lambda rank: info_nce(*rank.scores(), temperature=TEMPERATURE, allowed=rank.allowed()),
    "symmetric_info_nce": symmetric,
    "improved_info_nce": improved,
    "m3_loss": m3,
    "pointwise_bce": pointwise,
    "cosent": by_cosine,
    "angle": by_angle,
    "flops": lambda rank: flops(torch.relu(rank.gathered_passages)),
    **{name: distillation(name) for name in KD_LOSSES},
}


def together(world_size: int, loss: Callable[[Rank], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over ranks of loss and gradient; a gather's backward pass sums what all ranks say of a rank's rows."""
    towers = [torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))] * world_size
    towers = [tower.clone().requires_grad_() for tower in towers]
    vectors = {
        side: [
            F.normalize(part.double() @ tower, dim=-1)
            for part, tower in zip(texts.chunk(world_size), towers, strict=True)
        ]
        for side, texts in TEXTS.items()
    }
    losses, said = [], []
    for number, rows in enumerate(torch.arange(QUERIES).chunk(world_size)):
        gathered = [torch.cat(vectors[side]).detach().requires_grad_() for side in ("queries", "passages")]
        value = loss(Rank(rows, vectors["queries"][number], *gathered))
        found = torch.autograd.grad(
            value, [vectors["queries"][number], *gathered], allow_unused=True, materialize_grads=True
        )
        losses.append(value.detach())
        said.append(found)
    grads = []
    for number, tower in enumerate(towers):
        sums = [torch.stack([one[side] for one in said]).sum(dim=0).chunk(world_size)[number] for side in (1, 2)]
        upstream = [said[number][0] + sums[0], sums[1]]
        own = [vectors["queries"][number], vectors["passages"][number]]
        grads.append(torch.autograd.grad(own, tower, upstream)[0])
    return torch.stack(losses).mean(), torch.stack(grads).mean(dim=0)


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_together_give_the_loss_and_gradient_of_one(name: str) -> None:
    loss, grad = together(1, LOSSES[name])
    assert grad.abs().max() > 1e-2, "too small to compare"
    for world_size in (2, 4):
        found_loss, found_grad = together(world_size, LOSSES[name])
        torch.testing.assert_close(found_loss, loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found_grad, grad, atol=1e-6, rtol=1e-5)


def test_flops_of_each_ranks_mean_is_that_of_all_rows() -> None:
    def of_means(rank: Rank) -> Tensor:
        parts = torch.relu(rank.gathered_passages).chunk(QUERIES // len(rank.rows))
        return flops(torch.stack([part.mean(dim=0) for part in parts]))

    loss, grad = together(1, LOSSES["flops"])
    found_loss, found_grad = together(2, of_means)
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found_grad, grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cosent", "flops"])
def test_a_rank_that_looks_at_its_own_alone_would_give_another_loss(name: str) -> None:
    def alone(rank: Rank) -> Tensor:
        firsts = rank.gathered_passages[rank.rows * GROUP]
        if name == "flops":
            return flops(torch.relu(firsts))
        return cosent(F.cosine_similarity(rank.queries, firsts), LABELS[rank.rows], temperature=TEMPERATURE)

    assert (together(2, alone)[0] - together(1, alone)[0]).abs() > 1e-2
