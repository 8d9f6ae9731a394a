"""Losses that look at more than queries against passages: the same on any number of workers, and by their formulas."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.families import M3Config
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.training.objective import Objective
from tests.training.made_batches import different_keys, one_dataset, worker_batch
from tests.training.processes import in_workers

QUERIES, GROUP, VOCABULARY, WIDTH, T = 8, 3, 40, 6, 0.1
M3: dict[str, Any] = {"use_self_distill": True, "self_distill_start_step": 0, "flops_weight": 0.5}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "symmetric": ({"loss_type": "symmetric_info_nce"}, None),
    "improved": ({"loss_type": "improved_info_nce"}, None),
    "matryoshka": ({"mrl_dims": [2, 5]}, None),
    "margin": ({"false_negative_margin": -0.1}, None),
    "m3": ({}, M3),
    "m3, matryoshka": ({"mrl_dims": [2, 5]}, M3),
    "m3, margin and teacher": ({"false_negative_margin": 0.2, "knowledge_distillation": True}, M3),
    "m3, own group": ({"no_in_batch_neg": True}, M3),
    "m3 without the sum as teacher": ({}, {**M3, "use_self_distill": False}),
}
Outputs = Mapping[str, Tensor]


class Tower(nn.Module):
    """Token ids to M3's three representations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.dense, self.sparse, self.colbert = (nn.Linear(WIDTH, size) for size in (5, 1, 4))

    def forward(self, texts: list[list[int]], *, heads: bool) -> Outputs:
        length = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
        hidden = self.tokens(ids)
        dense = F.normalize(self.dense((hidden * mask.unsqueeze(-1)).sum(1)), dim=-1)
        if not heads:
            return {"dense": dense}
        return {
            "dense": dense,
            "ids": ids,
            "sparse": torch.relu(self.sparse(hidden)).squeeze(-1) * mask,
            "colbert": F.normalize(self.colbert(hidden), dim=-1) * mask.unsqueeze(-1),
            "mask": mask,
        }


def texts(count: int, seed: int) -> list[list[int]]:
    """Of 2 to 9 tokens, so that workers' longest texts differ."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=draw).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


def setup(train: dict[str, Any], m3: dict[str, Any] | None) -> Experiment:
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none", family="encoder" if m3 is None else "m3"),
        m3=None if m3 is None else M3Config(**m3),
        data=DataConfig(train_group_size=GROUP),
        train=TrainConfig(**{"temperature": T, **train}),
    )


def teacher() -> Tensor:
    return 2 * torch.randn(QUERIES, GROUP, generator=torch.Generator().manual_seed(3))


def losses_and_gradients() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """One worker's, for every case."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for name, (train, m3) in CASES.items():
        tower = Tower()
        share = [QUERIES // world_size, QUERIES * GROUP // world_size]
        own = [every[rank * n : (rank + 1) * n] for every, n in zip(global_texts(), share, strict=True)]
        outputs = [tower(part, heads=m3 is not None) for part in own]
        taught = teacher() if train.get("knowledge_distillation") else None
        experiment = setup(train, m3)
        batch = worker_batch(different_keys(QUERIES, GROUP), taught, one_dataset(experiment), rank, world_size)
        loss = Objective(experiment)(outputs, batch, step=1)
        loss.backward()
        found[name] = loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in tower.parameters()]
    return found


def global_texts() -> tuple[list[list[int]], list[list[int]]]:
    return texts(QUERIES, 1), texts(QUERIES * GROUP, 2)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """One worker with the global batch."""
    found: dict[str, tuple[Tensor, list[Tensor]]] = in_workers(1, losses_and_gradients)[0]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_together_give_what_one_gives(world_size: int, alone: dict[str, tuple[Tensor, list[Tensor]]]) -> None:
    workers = in_workers(world_size, losses_and_gradients)
    for name, (loss, grads) in alone.items():
        mean = torch.stack([worker[name][0] for worker in workers]).mean()
        torch.testing.assert_close(mean, loss, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        assert max(grad.abs().max() for grad in grads) > 1e-2, "too small to compare"
        for index, grad in enumerate(grads):
            together = torch.stack([worker[name][1][index] for worker in workers]).mean(dim=0)
            torch.testing.assert_close(together, grad, atol=2e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_losses_are_those_of_their_formulas(alone: dict[str, tuple[Tensor, list[Tensor]]]) -> None:
    tower, (queries, passages) = Tower(), global_texts()
    q, p = (tower(part, heads=True)["dense"].detach().double() for part in (queries, passages))
    own = torch.arange(QUERIES) * GROUP
    d, losses = p[own], {}

    def ce(*logits: Tensor, positives: Tensor) -> Tensor:
        return F.cross_entropy(torch.cat(logits, dim=1) / T, positives)

    def others(scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.eye(QUERIES, dtype=torch.bool), -torch.inf)

    losses["symmetric"] = (ce(q @ p.T, positives=own) + ce(d @ q.T, positives=torch.arange(QUERIES))) / 2
    groups = torch.arange(QUERIES * GROUP) // GROUP == torch.arange(QUERIES).unsqueeze(1)
    of_others = (d @ p.T).masked_fill(groups, -torch.inf)
    losses["improved"] = ce(q @ p.T, others(q @ q.T), others(d @ q.T), of_others, positives=own)
    short = [[F.normalize(side[:, :size], dim=-1) for side in (q, p)] for size in (2, 5)]
    losses["matryoshka"] = torch.stack([ce(a @ b.T, positives=own) for a, b in short]).mean()
    scores = q @ p.T
    near = (scores > scores.gather(1, own.unsqueeze(1)) - 0.1) & ~groups
    assert near.sum() > 5, "the data must show what is tested"
    losses["margin"] = ce(scores.masked_fill(near, -torch.inf), positives=own)
    for name, loss in losses.items():
        torch.testing.assert_close(alone[name][0].double(), loss, atol=1e-5, rtol=1e-5, msg=name)


def test_the_sum_teaches_from_its_step_on() -> None:
    outputs = [Tower()(part, heads=True) for part in global_texts()]
    experiment = setup({}, {"self_distill_start_step": 3})
    batch = worker_batch(different_keys(QUERIES, GROUP), None, one_dataset(experiment), 0, 1)
    objective = Objective(experiment)
    never = Objective(setup({}, {"use_self_distill": False}))(outputs, batch)
    assert [bool(objective(outputs, batch, step=step) == never) for step in (0, 2, 3, 9)] == [True, True, False, False]
