"""CoSENT and AnglE are their definitions."""

import pytest
import torch

from rayembed.losses import angle, cosent
from rayembed.losses.scored_pairs import angle_similarity
from tests.losses import reference

LABELS = {
    "different": [0.9, 0.1, 0.5, 0.3, 0.7],
    "with ties": [1.0, 0.0, 1.0, 0.5, 0.0],
    "all equal": [0.4] * 5,
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_cosent_is_its_definition(labels: list[float], temperature: float) -> None:
    reference.assert_same(
        lambda s: cosent(s, torch.tensor(labels), temperature=temperature),
        lambda s: reference.cosent(s, labels, temperature),
        reference.random_scores(1, 5, seed=1)[0],
    )


def test_pairs_in_the_right_order_by_far_cost_next_to_nothing_and_in_the_wrong_order_much() -> None:
    labels = torch.tensor([0.0, 0.5, 1.0])
    scores = torch.tensor([-0.9, 0.0, 0.9])
    assert cosent(scores, labels, temperature=0.05).item() < 1e-6
    assert cosent(scores.flip(0), labels, temperature=0.05).item() == pytest.approx(1.8 / 0.05, abs=1e-3)


@pytest.mark.parametrize("width", [4, 7])
def test_angle_is_cosent_over_angles_between_complex_vectors(width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    x, y = torch.randn(5, width, generator=draw), torch.randn(5, width, generator=draw)
    labels = LABELS["with ties"]
    torch.testing.assert_close(angle_similarity(x, y).double(), reference.angle_similarity(x.double(), y.double()))
    reference.assert_same(
        lambda x, y: angle(x, y, torch.tensor(labels), temperature=0.2),
        lambda x, y: reference.cosent(reference.angle_similarity(x, y), labels, 0.2),
        x,
        y,
    )
