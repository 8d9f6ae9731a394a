"""Beginnings are slices, scaled again where asked."""

import pytest
import torch
import torch.nn.functional as F

from rayembed.losses import beginnings


def test_beginnings_are_the_first_numbers_of_every_vector() -> None:
    vectors = torch.arange(8.0).view(2, 4)
    assert [part.tolist() for part in beginnings(vectors, [3, 1], normalize=False)] == [
        [[0, 1, 2], [4, 5, 6]],
        [[0], [4]],
    ]


def test_they_are_scaled_after_the_cut_and_the_scale_before_makes_no_difference() -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0], [0.0, -2.0, 5.0]])
    for given in (vectors, F.normalize(vectors, dim=-1)):
        two, whole = beginnings(given, [2, 3], normalize=True)
        torch.testing.assert_close(two, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
        torch.testing.assert_close(whole, vectors / vectors.square().sum(dim=1, keepdim=True).sqrt())


def test_a_beginning_longer_than_the_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.mrl_dims has 8, and vectors have 4 dimensions; set 4 or less"):
        beginnings(torch.zeros(2, 4), [2, 8], normalize=True)
