"""The passages that an embedder scores: each once, and few bytes a passage in the driver; no Ray."""

import tracemalloc
from pathlib import Path

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.data.store import ROWS, Store, StoreWriter
from rayembed.jobs import score

PER_ROW = 50
MODEL = ModelConfig(name_or_path="none is read")


def rows(folder: Path, passages: int) -> Store:
    """Rows whose passages come up twice: as a positive, and as a negative of the next row."""
    texts = [f"text {i}" for i in range(passages)]
    writer = StoreWriter(folder, ROWS, 8)
    for i in range(0, passages, PER_ROW):
        pos, neg = texts[i : i + PER_ROW], texts[i - PER_ROW : i]
        writer.add({"query_id": f"q{i}", "query": f"q{i}", "pos": pos, "neg": neg, "dataset": "d"})
    return writer.finish()


def unique(folder: Path, store: Store) -> Store:
    return score._unique_passages(Experiment(output_dir=str(folder), model=MODEL), store)


def test_each_passage_is_there_once_in_the_order_of_the_rows(tmp_path: Path) -> None:
    found = unique(tmp_path, rows(tmp_path / "rows", 1000))
    texts = [text for table in found.iter_parts(["text"]) for text in table.column("text").to_pylist()]
    assert texts == [f"text {i}" for i in range(1000)]


def test_the_driver_holds_few_bytes_a_passage(tmp_path: Path) -> None:
    """Some 30, most of them while the index of the store is written; with a set of numbers they are 110."""
    peaks = []
    for passages in (15_000, 45_000):
        store = rows(tmp_path / str(passages), passages)
        tracemalloc.start()
        unique(tmp_path / f"run-{passages}", store)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 30_000 < 60
