"""Batches of scored pairs and of labelled texts, and their losses, on any number of workers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayembed.config import Experiment
from rayembed.config.data import DataConfig, DatasetConfig
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.data.datasets import read_datasets
from rayembed.data.mixing import batch_plan
from rayembed.data.store import ROWS, StoreWriter
from rayembed.data.tokens import TokenStore, write_tokens
from rayembed.losses import angle, cosent
from rayembed.training.batches import BatchSource
from rayembed.training.objective import Objective
from tests.training.made_batches import different_keys, one_dataset, source_of, worker_batch
from tests.training.processes import in_workers
from tests.training.test_batches import texts

PAIRS, BATCH = 8, 4


def row(number: int, dataset: str, kind: str, **columns: Any) -> dict[str, Any]:  # noqa: ANN401 - of a row
    empty = {"pos": [], "pos_ids": [], "neg": [], "neg_ids": []}
    return {"query_id": str(number), "dataset": dataset, "type": kind, "query": str(number), **empty, **columns}


@pytest.fixture
def source(tmp_path: Path) -> BatchSource:
    """12 scored pairs, whose score is their number, and 20 texts of 4 labels."""
    rows = [row(i, "pairs", "sts", pos=[str(100 + i)], pos_ids=[f"p{i}"], pos_scores=[float(i)]) for i in range(12)]
    rows += [row(i, "texts", "class", label=f"label {i % 4}") for i in range(200, 220)]
    writer = StoreWriter(tmp_path / "rows", ROWS, 100)
    for own in rows:
        writer.add(own)
    store = writer.finish()
    write_tokens(
        pa.Table.from_pylist(rows, schema=ROWS),
        tmp_path,
        "0",
        model=ModelConfig(name_or_path="none"),
        tokenize=lambda found, length: [[int(text)] for text in found],
        query_max_len=8,
        passage_max_len=8,
    )
    experiment = Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none"),
        data=DataConfig(train_group_size=3, datasets=[DatasetConfig(name="texts", no_in_batch_neg=False)]),
        train=TrainConfig(global_batch_size=BATCH),
    )
    datasets = read_datasets(store, experiment)
    return source_of(TokenStore(tmp_path, ["0"]), datasets, batch_plan(datasets, experiment))


def batches(source: BatchSource, kind: str) -> Iterator[tuple[int, Any]]:
    for number in range(2 * source.plan.batches_per_epoch):
        if source.datasets.items[source.plan.dataset(number)].type == kind:
            yield number, source.batch(number)


def test_scored_pairs_bring_their_scores(source: BatchSource) -> None:
    found = list(batches(source, "sts"))
    assert len(found) == 2 * 3
    for _, batch in found:
        firsts, seconds = (texts(side) for side in batch.inputs)
        assert [[100 + own for own in text] for text in firsts] == seconds
        assert batch.teacher is not None
        assert batch.teacher[:, 0].tolist() == [text[0] for text in firsts]
        assert (batch.dataset.loss, batch.dataset.group_size) == ("cosent", 1)


def test_labelled_texts_meet_one_of_their_label_and_others(source: BatchSource) -> None:
    drawn = set()
    for number, batch in batches(source, "class"):
        queries, passages = ([text[0] for text in texts(side)] for side in batch.inputs)
        labels = [[text % 4 for text in passages[i * 3 : i * 3 + 3]] for i in range(BATCH)]
        for query, own, start in zip(queries, labels, range(0, 3 * BATCH, 3), strict=True):
            assert own[0] == query % 4
            assert passages[start] != query
            assert query % 4 not in own[1:]
        drawn |= {(query, passages[i * 3]) for i, query in enumerate(queries)}
        known = batch.keys.positives[:, 0].tolist()
        same = [[key == own for key in batch.keys.passages.tolist()] for own in known]
        assert same == [[text % 4 == query % 4 for text in passages] for query in queries], "no false negatives"
        parts = [replace(source, rank=rank, world_size=2).batch(number) for rank in range(2)]
        assert [text for part in parts for text in texts(part.inputs[1])] == texts(batch.inputs[1])
    assert len(drawn) > 20, "other positives in the second epoch"


def experiment(loss: str) -> tuple[Experiment, dict[str, Any]]:
    made = Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none"),
        data=DataConfig(train_group_size=1),
        train=TrainConfig(scored_pairs_temperature=0.1),
    )
    return made, {"type": "sts", "loss": loss, "group_size": 1}


def vectors() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    sides = [F.normalize(torch.randn(PAIRS, 6, generator=draw), dim=-1) for _ in range(2)]
    return sides[0], sides[1], torch.rand(PAIRS, 1, generator=draw)


def losses_and_gradients() -> dict[str, tuple[Tensor, Tensor]]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first, second, labels = vectors()
    found = {}
    for loss in ("cosent", "angle"):
        made, told = experiment(loss)
        weight = torch.eye(6, requires_grad=True)
        own = [(side @ weight).chunk(world_size)[rank] for side in (first, second)]
        batch = worker_batch(different_keys(PAIRS, 1), labels, one_dataset(made, **told), rank, world_size)
        value = Objective(made)(own, batch)
        value.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        found[loss] = value.detach(), weight.grad
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scored_pairs_of_all_workers_are_compared(world_size: int) -> None:
    workers = in_workers(world_size, losses_and_gradients)
    first, second, labels = vectors()
    for loss in ("cosent", "angle"):
        weight = torch.eye(6, requires_grad=True)
        sides = first @ weight, second @ weight
        if loss == "angle":
            value = angle(*sides, labels[:, 0], temperature=0.1)
        else:
            value = cosent(torch.cosine_similarity(*sides), labels[:, 0], temperature=0.1)
        value.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert weight.grad.abs().max() > 1e-2
        for worker in workers:
            torch.testing.assert_close(worker[loss][0], value.detach(), atol=1e-5, rtol=1e-5)
        together = torch.stack([worker[loss][1] for worker in workers]).mean(dim=0)
        torch.testing.assert_close(together, weight.grad, atol=1e-5, rtol=1e-4)
    assert np.isfinite(float(value))
