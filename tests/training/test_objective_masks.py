"""Pairs of rerankers, a guide, and the masks of symmetric losses: the same on any number of workers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import Family, ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.models.chunks import TokenBatch
from rayembed.models.embedder import Embedder
from rayembed.training.batches import Batch, Keys
from rayembed.training.objective import Objective
from tests.training.made_batches import different_keys, one_dataset, worker_batch
from tests.training.processes import in_workers

QUERIES, GROUP, WIDTH, T = 8, 3, 5, 0.1
PAIRS: dict[str, dict[str, Any]] = {
    "listwise": {},
    "pointwise": {"loss_type": "pointwise_bce"},
    "pointwise of a teacher": {"loss_type": "pointwise_bce", "knowledge_distillation": True},
    "kl_div": {"knowledge_distillation": True},
    "margin_mse": {"knowledge_distillation": True, "kd_loss_type": "margin_mse"},
}
VECTORS: dict[str, dict[str, Any]] = {
    "symmetric": {"loss_type": "symmetric_info_nce"},
    "improved": {"loss_type": "improved_info_nce"},
    "guide": {"false_negative_margin": 0.0, "guide_model": "a guide", "mask_same_texts": False},
}


def setup(family: Family, **train: Any) -> Experiment:  # noqa: ANN401 - any setting of the section
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none", family=family),
        data=DataConfig(train_group_size=GROUP),
        train=TrainConfig(temperature=T, **train),
    )


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Guide(Embedder):
    """Vectors that were made up, by what stands in for the texts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def embed(self, batch: TokenBatch) -> Tensor:
        return batch.order


def of_guide() -> list[Tensor]:
    return [F.normalize(normal(count, WIDTH, seed=9 + count), dim=-1) for count in (QUERIES, QUERIES * GROUP)]


def same_texts() -> Keys:
    """Queries 2 and 5 are the same, rows 0 and 6 have the same positive, 3 has another row's as a second one."""
    keys = different_keys(QUERIES, GROUP)
    keys.queries[5] = keys.queries[2]
    keys.passages[6 * GROUP] = keys.passages[0]
    keys.positives[6] = keys.positives[0]
    second = torch.zeros(QUERIES, 2, dtype=torch.long)
    second[3, 1] = keys.passages[7 * GROUP]
    return Keys(keys.queries, torch.cat([keys.positives, second], dim=1), keys.passages)


def narrowed(batch: Batch) -> Batch:
    """With as many columns of positives as this worker's rows need."""
    keys = batch.keys
    used = int((keys.positives != 0).any(dim=0).nonzero().max()) + 1
    return Batch(
        batch.inputs, batch.teacher, Keys(keys.queries, keys.positives[:, :used], keys.passages), batch.dataset
    )


def losses_and_gradients() -> dict[str, tuple[Tensor, Tensor]]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    teacher, found = 2 * normal(QUERIES, GROUP, seed=3), {}
    for name, train in PAIRS.items():
        experiment = setup("reranker-encoder", **train)
        weight = torch.ones(WIDTH, requires_grad=True)
        scores = normal(QUERIES * GROUP, WIDTH, seed=1).chunk(world_size)[rank] @ weight
        taught = teacher if train.get("knowledge_distillation") else None
        batch = worker_batch(different_keys(QUERIES, GROUP), taught, one_dataset(experiment), rank, world_size)
        loss = Objective(experiment)([scores], batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        found[name] = loss.detach(), weight.grad
    for name, train in VECTORS.items():
        experiment = setup("encoder", **train)
        matrix = torch.eye(WIDTH, requires_grad=True)
        sides = [normal(count, WIDTH, seed=count).chunk(world_size)[rank] for count in (QUERIES, QUERIES * GROUP)]
        batch = narrowed(worker_batch(same_texts(), None, one_dataset(experiment), rank, world_size))
        inputs = tuple(TokenBatch((), side.chunk(world_size)[rank]) for side in of_guide())
        batch = Batch(inputs, None, batch.keys, batch.dataset)
        loss = Objective(experiment, guide=Guide())([F.normalize(side @ matrix, dim=-1) for side in sides], batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert matrix.grad is not None
        found[name] = loss.detach(), matrix.grad
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = in_workers(1, losses_and_gradients)[0]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_together_give_what_one_gives(world_size: int, alone: dict[str, tuple[Tensor, Tensor]]) -> None:
    workers = in_workers(world_size, losses_and_gradients)
    for name, (loss, grad) in alone.items():
        mean = torch.stack([worker[name][0] for worker in workers]).mean()
        together = torch.stack([worker[name][1] for worker in workers]).mean(dim=0)
        torch.testing.assert_close(mean, loss, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(together, grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        assert grad.abs().max() > 1e-3, name


def test_losses_are_those_of_their_formulas(alone: dict[str, tuple[Tensor, Tensor]]) -> None:
    scores = normal(QUERIES * GROUP, WIDTH, seed=1).sum(dim=1).view(QUERIES, GROUP).double()
    teacher, first = (2 * normal(QUERIES, GROUP, seed=3)).double(), torch.zeros(QUERIES, dtype=torch.long)
    listwise = F.cross_entropy(scores / T, first)
    labels = F.one_hot(first, GROUP).double()
    target = torch.softmax(teacher, dim=-1)
    margins = [(side[:, :1] - side[:, 1:]) for side in (scores, teacher)]
    expected = {
        "listwise": listwise,
        "pointwise": F.binary_cross_entropy_with_logits(scores / T, labels),
        "pointwise of a teacher": F.binary_cross_entropy_with_logits(scores / T, torch.sigmoid(teacher)),
        "kl_div": listwise - (target * torch.log_softmax(scores / T, dim=-1)).sum(dim=-1).mean(),
        "margin_mse": F.mse_loss(*margins),
    }
    q, p = (F.normalize(normal(count, WIDTH, seed=count), dim=-1).double() for count in (QUERIES, QUERIES * GROUP))
    own = torch.arange(QUERIES) * GROUP
    groups = torch.arange(QUERIES * GROUP) // GROUP == torch.arange(QUERIES).unsqueeze(1)
    guided = of_guide()[0] @ of_guide()[1].T
    near = (guided > guided.gather(1, own.unsqueeze(1))) & ~groups
    assert near.sum() > 5, "the data must show what is tested"
    expected["guide"] = F.cross_entropy((q @ p.T).masked_fill(near, -torch.inf) / T, own)
    known = torch.zeros(QUERIES, QUERIES * GROUP, dtype=torch.bool)
    for query, passage in ((2, 5 * GROUP), (5, 2 * GROUP), (0, 6 * GROUP), (6, 0), (3, 7 * GROUP)):
        known[query, passage] = True
    forward = F.cross_entropy((q @ p.T).masked_fill(known, -torch.inf) / T, own)
    same = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    for positive, query in ((2, 5), (5, 2), (0, 6), (6, 0), (7, 3)):  # the last: 7's positive is one of 3's too
        same[positive, query] = True
    backward = F.cross_entropy((p[own] @ q.T).masked_fill(same, -torch.inf) / T, torch.arange(QUERIES))
    expected["symmetric"] = (forward + backward) / 2
    for name, loss in expected.items():
        torch.testing.assert_close(alone[name][0].double(), loss, atol=1e-5, rtol=1e-5, msg=name)
