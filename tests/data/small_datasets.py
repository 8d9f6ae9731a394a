"""Rows of several datasets as a store, and experiments over them."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.data.store import ROWS, Store, StoreWriter

Rows = list[dict[str, Any]]


def plain(dataset: str, number: int, **more: object) -> Rows:
    """Rows of retrieval, each with two negatives."""
    row = {"dataset": dataset, "pos": ["p"], "neg": ["n", "m"]}
    return [{"query_id": f"{dataset}{i}", "query": f"{dataset} {i}", **row, **more} for i in range(number)]


def labelled(dataset: str, labels: str) -> Rows:
    """A row for each letter, which is its label."""
    return [
        row | {"label": label} for row, label in zip(plain(dataset, len(labels), **NO_PASSAGES), labels, strict=True)
    ]


NO_PASSAGES = {"pos": [], "neg": [], "type": "class"}


def store(folder: Path, rows: Rows, *, rows_per_part: int = 5) -> Store:
    """The rows in parts."""
    writer = StoreWriter(folder / "rows", ROWS, rows_per_part)
    for row in rows:
        writer.add(row)
    return writer.finish()


def experiment(
    *, workers: int | tuple[int, int] = 1, train: dict[str, object] | None = None, seed: int = 42, **data: object
) -> Experiment:
    """An experiment with these settings; two queries a worker."""
    return Experiment(
        output_dir="none",
        seed=seed,
        model=ModelConfig(name_or_path="none"),
        ray=RayConfig(num_workers=workers, max_failures=1),
        train=TypeAdapter(TrainConfig).validate_python({"per_device_train_batch_size": 2} | (train or {})),
        data=TypeAdapter(DataConfig).validate_python({"train_group_size": 3} | data),
    )
