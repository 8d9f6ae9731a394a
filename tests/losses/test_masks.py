"""Masks leave out what they say, never of the own group, and let no gradient through."""

import pytest
import torch

from rayembed.losses import by_keys, by_margin, share_keys, up_to
from tests.losses import reference


def test_positives_of_a_query_in_other_groups_are_left_out() -> None:
    positive_keys = torch.tensor([[7, 8], [9, 0]])
    passage_keys = torch.tensor([7, 5, 9, 7, 8, 0, 9, 3])  # groups of 2; those of other ranks in columns 4 to 7
    allowed = by_keys(positive_keys, passage_keys, torch.tensor([0, 2]), 2)
    left_out = [(row, column) for row, column in (~allowed).nonzero().tolist()]
    assert left_out == [(0, 3), (0, 4), (1, 6)]  # key 7 in column 0 is query 0's own, key 0 stands for none


@pytest.mark.parametrize("seed", range(3))
def test_by_keys_is_its_definition(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    keys, passages = (torch.randint(0, 6, size, generator=draw) for size in ((4, 3), (12,)))
    positives = torch.tensor([3, 0, 9, 6])
    allowed = by_keys(keys, passages, positives, 3)
    for i in range(4):
        known = set(keys[i].tolist()) - {0}
        for j in range(12):
            start = int(positives[i])
            assert allowed[i, j].item() == (start <= j < start + 3 or int(passages[j]) not in known), (i, j)


def test_texts_share_any_key_but_0() -> None:
    keys, others = torch.tensor([[1, 2], [0, 3], [0, 0]]), torch.tensor([[2, 1], [3, 4], [0, 0]])
    assert share_keys(keys, others).tolist() == [[True, False, False], [False, True, False], [False, False, False]]


@pytest.mark.parametrize("margin", [-0.3, 0.0, 0.2])
def test_by_margin_is_its_definition(margin: float) -> None:
    scores, positives = reference.random_scores(3, 12, seed=1), torch.tensor([4, 0, 8])
    scores[:, 3] = scores[torch.arange(3), positives]  # as high as the positive
    allowed = by_margin(scores, positives, 4, margin)
    assert 0 < allowed.sum() < allowed.numel()
    for i, row in enumerate(scores.tolist()):
        start = int(positives[i])
        for j, score in enumerate(row):
            expected = start <= j < start + 4 or score <= row[start] + margin
            assert allowed[i, j].item() == expected, (i, j)


def test_a_mask_brings_no_gradient_with_it() -> None:
    scores = reference.random_scores(2, 4, seed=2).requires_grad_()
    assert not by_margin(scores, torch.tensor([0, 2]), 2, 0.0).requires_grad
    assert not up_to(scores, scores[:, 0]).requires_grad


def test_what_is_not_a_number_stays_in_and_is_seen() -> None:
    assert up_to(torch.tensor([[torch.nan, 1.0, 3.0]]), torch.tensor([2.0])).tolist() == [[True, True, False]]
