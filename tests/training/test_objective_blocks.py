"""Losses that go through the queries block by block are those of whole matrices, and hold no such matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayembed.training import objective
from rayembed.training.blocks import mean_in_blocks
from rayembed.training.objective import Objective
from tests.training import test_objective, test_objective_kinds, test_objective_masks
from tests.training.made_batches import different_keys, one_dataset, worker_batch
from tests.training.processes import in_workers

OF_ALL_LOSSES: tuple[Callable[[], dict[str, tuple[Tensor, Any]]], ...] = (
    test_objective.losses_and_gradients,
    test_objective_kinds.losses_and_gradients,
    test_objective_masks.losses_and_gradients,
)
SCORES = (36, 72)  # of 24 passages: a query at a time, or three; of this worker's own 12: three, or all four


def whole_and_in_blocks() -> list[tuple[str, Tensor, Tensor]]:
    """Of every case, loss and gradients of both, and how many blocks there were."""
    found, blocks = [], [0]
    of_block = Objective._of_block

    def counted(self: Objective, *inputs: Any) -> Tensor:  # noqa: ANN401
        blocks[0] += 1
        return of_block(self, *inputs)

    Objective._of_block = counted  # type: ignore[assignment, method-assign]
    for of_losses in OF_ALL_LOSSES:
        expected = flat(of_losses())
        calls, blocks[0] = blocks[0], 0
        for scores in SCORES:
            whole, objective.BLOCK_SCORES = objective.BLOCK_SCORES, scores
            parts = flat(of_losses())
            objective.BLOCK_SCORES = whole
            assert blocks[0] > calls  # several for some of the losses
            blocks[0] = 0
            found += [(f"{name}, {scores}", parts[name], expected[name]) for name in expected]
    return found


def flat(cases: dict[str, tuple[Tensor, Any]]) -> dict[str, Tensor]:
    return {
        name: torch.cat([part.flatten() for part in (loss, *(grads if isinstance(grads, list) else [grads]))])
        for name, (loss, grads) in cases.items()
    }


def test_every_loss_in_blocks_is_that_of_the_whole() -> None:
    for found in in_workers(2, whole_and_in_blocks):
        assert len(found) == 2 * (18 + 9 + 8)
        for name, parts, whole in found:
            torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def largest_kept(scores_at_once: int) -> int:
    """Numbers in the largest tensor that is kept for the backward pass of 64 queries with 192 passages."""
    experiment = test_objective.setup(temperature=0.1)
    draw = torch.Generator().manual_seed(0)
    queries, passages = (F.normalize(torch.randn(count, 8, generator=draw), dim=-1) for count in (64, 192))
    sizes = [0]

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    sides = [queries.requires_grad_(), passages.requires_grad_()]
    batch = worker_batch(different_keys(64, 3), None, one_dataset(experiment), 0, 1)
    whole, objective.BLOCK_SCORES = objective.BLOCK_SCORES, scores_at_once
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Objective(experiment)(sides, batch)
    objective.BLOCK_SCORES = whole
    return max(sizes)


def test_no_matrix_of_scores_is_kept() -> None:
    assert largest_kept(2**22) >= 64 * 192
    assert largest_kept(1024) <= 192 * 8  # the vectors


def test_blocks_weigh_by_their_rows_and_ask_for_no_gradient_where_none_is_wanted() -> None:
    rows = torch.arange(5.0, requires_grad=True)
    shared, frozen = torch.tensor([2.0], requires_grad=True), torch.tensor([3, 4])
    seen = list[tuple[int, bool]]()

    def mean_of(place: slice, by_row: Sequence[Tensor], every: Sequence[Tensor]) -> Tensor:
        seen.append((len(by_row[0]), torch.is_grad_enabled()))
        assert torch.equal(by_row[0].detach(), torch.arange(5.0)[place])
        return (by_row[0] ** 2 * every[0] * every[1][0]).mean()

    mean = mean_in_blocks(mean_of, [rows], [shared, frozen], rows=2)
    assert mean.item() == pytest.approx(30 / 5 * 6)
    (mean * 10).backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert shared.grad is not None
    torch.testing.assert_close(rows.grad, 10 * 2 * torch.arange(5.0) * 6 / 5)
    torch.testing.assert_close(shared.grad, torch.tensor([10 * 30 / 5 * 3]))
    assert seen == [(2, True), (2, True), (1, True)], "each block once, the last with the rows that are left"
    with torch.no_grad():
        assert float(mean_in_blocks(mean_of, [rows], [shared, frozen], rows=5)) == pytest.approx(36)
    assert seen[3:] == [(5, False)]
