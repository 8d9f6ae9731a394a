"""Batches whose texts are numbers: vectors come from a small tower, keys say which texts are the same."""

from typing import Any

import torch
from torch import Tensor

from rayembed.config import Experiment
from rayembed.data.datasets import Dataset, Datasets
from rayembed.data.plan import Plan
from rayembed.data.tokens import TokenStore
from rayembed.training.batches import Batch, BatchSource, Keys


def source_of(
    tokens: TokenStore,
    datasets: Datasets,
    plan: Plan,
    **changes: Any,  # noqa: ANN401 - fields of a source
) -> BatchSource:
    """All batches on one worker, without scores, padded on the right by token 0."""
    told: dict[str, Any] = {
        **{"rank": 0, "world_size": 1, "distill": False, "layout": None, "pin_memory": False},
        **{"pad_token": 0, "padding_side": "right", "pad_to_multiple_of": None, "sub_batch_size": None},
    }
    return BatchSource(tokens=tokens, datasets=datasets, plan=plan, **{**told, **changes})


def different_keys(num_queries: int, group_size: int) -> Keys:
    """Of texts of which no two are the same, on this worker; every row has one positive."""
    passages = torch.arange(num_queries * group_size) + 1
    return Keys(passages[::group_size] + 10**6, passages[::group_size].unsqueeze(1), passages)


def one_dataset(experiment: Experiment, **settings: Any) -> Dataset:  # noqa: ANN401 - of a dataset
    """Of all rows, as the experiment says."""
    train = experiment.train
    assert train is not None
    told = {
        "group_size": experiment.data.train_group_size,
        "loss": train.loss_type,
        "no_in_batch_neg": train.no_in_batch_neg,
        "batch_sizes": ((None, experiment.global_batch_size()),),
    }
    return Dataset(**{"name": "", "type": None, "num_rows": 0, "weight": 1.0, **told, **settings})


def worker_batch(keys: Keys, teacher: Tensor | None, dataset: Dataset, rank: int, world_size: int) -> Batch:
    """One worker's part of a global batch; without token ids, which no loss reads."""
    parts = (keys.queries, keys.positives, keys.passages)
    own = Keys(*(part.chunk(world_size)[rank] for part in parts))
    return Batch((), None if teacher is None else teacher.chunk(world_size)[rank], own, dataset)
