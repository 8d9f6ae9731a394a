"""InfoNCE, its symmetric and its improved form are their definitions, masked or not."""

import math

import pytest
import torch
from torch import Tensor

from rayembed.losses import FourWays, improved_info_nce, info_nce, symmetric_info_nce
from rayembed.losses.contrastive import group_scores
from tests.losses import reference


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 5), (3, 1), (4, 3)])
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_info_nce_is_its_definition(queries: int, group: int, temperature: float) -> None:
    scores = reference.random_scores(queries, queries * group, seed=queries)
    positives = [query * group for query in range(queries)]
    loss = info_nce(scores, torch.tensor(positives), temperature=temperature)
    assert loss.item() == pytest.approx(reference.info_nce(scores, positives, temperature), rel=1e-6, abs=1e-6)


def test_equal_scores_give_log_of_the_number_of_passages() -> None:
    assert info_nce(torch.zeros(4, 10), torch.arange(4), temperature=0.02).item() == pytest.approx(math.log(10))


def test_its_gradient_is_the_softmax_less_the_positive_over_temperature_and_queries() -> None:
    scores = reference.random_scores(3, 6, seed=1).requires_grad_()
    positives = torch.tensor([0, 2, 4])
    info_nce(scores, positives, temperature=0.1).backward()
    expected = torch.tensor([reference.softmax([s / 0.1 for s in row]) for row in scores.tolist()])
    expected[torch.arange(3), positives] -= 1
    torch.testing.assert_close(scores.grad, expected / (0.1 * 3), atol=1e-6, rtol=1e-5)


def test_half_precision_scores_are_judged_in_float32() -> None:
    scores = torch.tensor([[0.75, 0.5, -0.25]], dtype=torch.bfloat16)
    loss = info_nce(scores, torch.tensor([1]), temperature=0.03)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.info_nce(scores, [1], 0.03), rel=1e-6)


def test_one_positive_for_each_query_is_demanded() -> None:
    with pytest.raises(ValueError, match=r"positives has shape \(2,\); scores \(3, 6\) need one per row"):
        info_nce(torch.zeros(3, 6), torch.arange(2), temperature=1.0)


def test_group_scores_begin_at_the_positive() -> None:
    scores = torch.arange(12.0).view(2, 6)
    assert group_scores(scores, torch.tensor([0, 3]), 3).tolist() == [[0, 1, 2], [9, 10, 11]]


def test_what_is_not_allowed_is_left_out_and_the_positive_never_is() -> None:
    scores, allowed = reference.random_scores(4, 8, seed=3), reference.random_mask(4, 8, seed=3)
    allowed[:, 0], allowed[0] = False, False  # query 0 has its positive alone left
    reference.assert_same(
        lambda s: info_nce(s, torch.tensor([0, 2, 4, 6]), temperature=0.1, allowed=allowed),
        lambda s: reference.masked_info_nce(s, [0, 2, 4, 6], 0.1, allowed.tolist()),
        scores,
    )
    assert info_nce(scores[:1], torch.tensor([0]), temperature=0.1, allowed=allowed[:1]).item() == 0


def test_a_mask_of_all_is_no_mask() -> None:
    scores, positives = reference.random_scores(3, 6, seed=4), torch.tensor([0, 2, 4])
    everything = info_nce(scores, positives, temperature=0.02, allowed=torch.ones(3, 6, dtype=torch.bool))
    assert everything.item() == info_nce(scores, positives, temperature=0.02).item()


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"allowed has shape \(1, 6\), scores \(3, 6\)"):
        info_nce(torch.zeros(3, 6), torch.arange(3), temperature=1.0, allowed=torch.ones(1, 6, dtype=torch.bool))


def test_symmetric_info_nce_is_the_mean_of_both_directions() -> None:
    scores, reverse = reference.random_scores(3, 7, seed=1), reference.random_scores(3, 5, seed=2)
    masks = reference.random_mask(3, 7, seed=1), reference.random_mask(3, 5, seed=2)
    positives, queries = [1, 3, 5], [2, 3, 4]

    def expected(s: Tensor, r: Tensor) -> Tensor:
        forward = reference.masked_info_nce(s, positives, 0.2, masks[0].tolist())
        return (forward + reference.masked_info_nce(r, queries, 0.2, masks[1].tolist())) / 2

    def ours(s: Tensor, r: Tensor) -> Tensor:
        columns = torch.tensor(positives), r, torch.tensor(queries)
        return symmetric_info_nce(s, *columns, temperature=0.2, allowed=masks[0], reverse_allowed=masks[1])

    reference.assert_same(ours, expected, scores, reverse)


@pytest.mark.parametrize(("own", "group"), [([0, 1, 2, 3], 1), ([0, 1, 2, 3], 3), ([2, 3], 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_improved_info_nce_is_its_definition(own: list[int], group: int, masked: bool) -> None:
    draw = torch.Generator().manual_seed(group)
    sizes = (4 * group, 4, 4, 4 * group)
    masks = [reference.random_mask(len(own), size, seed) | (not masked) for seed, size in enumerate(sizes)]

    def ours(q: Tensor, p: Tensor) -> Tensor:
        rows = torch.tensor(own)
        query, positive = q[rows], p[rows * group]
        scores = FourWays(query @ p.T, query @ q.T, positive @ q.T, positive @ p.T)
        allowed = FourWays(*masks) if masked else None
        return improved_info_nce(scores, rows * group, rows, temperature=0.5, group_size=group, allowed=allowed)

    def expected(q: Tensor, p: Tensor) -> Tensor:
        return reference.improved_info_nce(q, p, group, 0.5, own, [mask.tolist() for mask in masks])

    reference.assert_same(ours, expected, torch.randn(4, 3, generator=draw), torch.randn(4 * group, 3, generator=draw))


def test_improved_info_nce_of_one_query_alone_has_its_group_left() -> None:
    scores = FourWays(torch.zeros(1, 4), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 4))
    loss = improved_info_nce(scores, torch.tensor([0]), torch.tensor([0]), temperature=0.02, group_size=4)
    assert loss.item() == pytest.approx(math.log(4))
