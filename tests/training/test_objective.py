"""The mean over workers of loss and gradient is that of one plain process on the global batch, for every loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import Family, ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.training.batches import Keys
from rayembed.training.objective import Objective, negatives_per_query
from tests.training.made_batches import different_keys, one_dataset, worker_batch
from tests.training.processes import in_workers

QUERIES, GROUP, WIDTH = 8, 3, 6
CASES: dict[str, dict[str, Any]] = {
    f"{kind}, {negatives}, {'same texts masked' if mask else 'no mask'}": {
        "temperature": 0.1,
        "teacher_temperature": 0.7,
        "knowledge_distillation": kind != "info_nce",
        "kd_loss_type": "kl_div" if kind == "info_nce" else kind,
        "negatives_cross_device": negatives != "own worker's",
        "no_in_batch_neg": negatives == "own group's",
        "mask_same_texts": mask,
    }
    for kind in ("info_nce", "kl_div", "m3_kd_loss")
    for negatives in ("all workers'", "own worker's", "own group's")
    for mask in (True, False)
}


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 5))


def global_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, passages and the teacher's scores of all workers."""
    draw = torch.Generator().manual_seed(1)
    sizes = ((QUERIES, WIDTH), (QUERIES * GROUP, WIDTH), (QUERIES, GROUP))
    queries, passages, teacher = (torch.randn(*size, generator=draw) for size in sizes)
    return queries, passages, teacher * 2


def same_texts() -> Keys:
    """Queries 2 and 5 are the same; the positive of 1 is a negative of 6, and a second positive of 0 one of 7."""
    keys = different_keys(QUERIES, GROUP)
    keys.queries[5] = keys.queries[2]
    keys.passages[6 * GROUP + 1] = keys.passages[1 * GROUP]
    second = torch.zeros(QUERIES, 1, dtype=torch.long)
    second[0] = keys.passages[7 * GROUP + 2]
    return Keys(keys.queries, torch.cat([keys.positives, second], dim=1), keys.passages)


NO_NEGATIVES = {(2, 5 * GROUP), (5, 2 * GROUP), (1, 6 * GROUP + 1), (0, 7 * GROUP + 2)}  # (query, passage)


def setup(**train: Any) -> Experiment:  # noqa: ANN401 - any setting of the section
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none"),
        data=DataConfig(train_group_size=GROUP),
        train=TrainConfig(**train),
    )


def losses_and_gradients() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """One worker's, for every case."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    queries, passages, teacher = global_batch()
    found = {}
    for name, settings in CASES.items():
        model, experiment = tower(), setup(**settings)
        vectors = [F.normalize(model(part.chunk(world_size)[rank]), dim=-1) for part in (queries, passages)]
        taught = teacher if settings["knowledge_distillation"] else None
        loss = Objective(experiment)(
            vectors, worker_batch(same_texts(), taught, one_dataset(experiment), rank, world_size)
        )
        loss.backward()
        found[name] = loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]
    return found


def reference(settings: dict[str, Any], world_size: int) -> tuple[Tensor, list[Tensor]]:
    """One process, float64, query by query, from the definitions."""
    model, temperature = tower().double(), settings["temperature"]
    queries, passages, teacher = (part.double() for part in global_batch())
    targets = torch.softmax(teacher / settings["teacher_temperature"], dim=-1)
    q, p = (F.normalize(model(part), dim=-1) for part in (queries, passages))
    losses = []
    for i in range(QUERIES):
        own = list(range(i * GROUP, (i + 1) * GROUP))
        share = QUERIES // world_size
        first = i // share * share * GROUP
        among = list(range(len(p))) if settings["negatives_cross_device"] else list(range(first, first + share * GROUP))
        among = own if settings["no_in_batch_neg"] else among
        if settings["mask_same_texts"]:
            among = [j for j in among if (i, j) not in NO_NEGATIVES]
        logits = {j: q[i] @ p[j] / temperature for j in among}
        infonce = torch.logsumexp(torch.stack([*logits.values()]), 0) - logits[own[0]]
        if not settings["knowledge_distillation"]:
            losses.append(infonce)
        elif settings["kd_loss_type"] == "kl_div":
            total = torch.logsumexp(torch.stack([logits[j] for j in own]), 0)
            losses.append(infonce + sum(targets[i, k] * (total - logits[j]) for k, j in enumerate(own)))
        else:
            for k, j in enumerate(own):
                competing = torch.stack([logits[other] for other in among if other not in own[:k]])
                losses.append(targets[i, k] * (torch.logsumexp(competing, 0) - logits[j]))
    loss = torch.stack(losses).sum() / QUERIES
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_together_give_the_loss_and_gradient_of_the_global_batch(world_size: int) -> None:
    workers = in_workers(world_size, losses_and_gradients)
    for name, settings in CASES.items():
        loss, grads = reference(settings, world_size)
        mean_loss = torch.stack([worker[name][0] for worker in workers]).mean()
        torch.testing.assert_close(
            mean_loss, loss.float(), atol=1e-6, rtol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
        for index, grad in enumerate(grads):
            mean = torch.stack([worker[name][1][index] for worker in workers]).mean(dim=0)
            assert grad.abs().max() > 1e-2, "too small to compare"
            torch.testing.assert_close(
                mean, grad.float(), atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("encoder", {}, 4 * 2 * 3 - 1),
        ("encoder", {"negatives_cross_device": False}, 2 * 3 - 1),
        ("encoder", {"no_in_batch_neg": True}, 3 - 1),
        ("reranker-encoder", {}, 3 - 1),
    ],
)
def test_negatives_a_query_are_the_columns_less_the_positive(
    family: Family, settings: dict[str, Any], expected: int
) -> None:
    experiment = Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none", family=family),
        data=DataConfig(train_group_size=3),
        ray=RayConfig(num_workers=4),
        train=TrainConfig(per_device_train_batch_size=2, **settings),
    )
    assert negatives_per_query(experiment, one_dataset(experiment)) == expected
