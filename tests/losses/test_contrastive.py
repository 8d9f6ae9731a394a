"""InfoNCE is its definition, its gradient softmax minus one-hot."""

import math

import pytest
import torch

from rayembed.losses import info_nce
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
