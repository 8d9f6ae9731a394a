"""The texts that an embedder scores: each once, and few bytes a text in the driver; no Ray."""

import tracemalloc
from pathlib import Path

from rayembed.data.store import Store
from rayembed.jobs import pairs
from rayembed.jobs.pairs import PairScores, PairSource, Plan, PlannedPairs

PER_PART = 5000


class Numbered:
    """Pairs whose passages come up twice: in their part, and in the next one."""

    def __init__(self, *, passages: int) -> None:
        self._passages = passages

    def pairs(self, part: int) -> list[tuple[str, str]]:
        first = part * PER_PART
        numbers = range(max(first - PER_PART, 0), min(first + PER_PART, self._passages))
        return [(f"query {part + i % 2}", f"passage {i}") for i in numbers]


def written(folder: Path, passages: int, *, traced: bool = False) -> tuple[Store, Store]:
    parts = -(-passages // PER_PART)
    source = PairSource("tests.jobs.test_score_passages:Numbered", {"passages": passages}, parts, (PER_PART,) * parts)
    plan = Plan.made(source, PairScores(folder), folder / "plan", "score")
    if traced:
        tracemalloc.start()
    pairs._write_texts(folder, PlannedPairs(source, plan.folder), plan.units(), 2048)
    return Store.open(folder / "queries"), Store.open(folder / "passages")


def texts(store: Store) -> list[str]:
    return [text for table in store.iter_parts(["text"]) for text in table.column("text").to_pylist()]


def test_each_text_is_there_once(tmp_path: Path) -> None:
    queries, passages = written(tmp_path, 12_000)
    assert sorted(texts(passages)) == sorted(f"passage {i}" for i in range(12_000))
    assert sorted(texts(queries)) == [f"query {i}" for i in range(4)]
    found = passages.find_ids(pairs._text_ids(["passage 7", "passage 8", "passage -1"]))
    assert texts(passages)[found[0]] == "passage 7"
    assert texts(passages)[found[1]] == "passage 8"
    assert found[2] == -1


def test_the_driver_holds_few_bytes_a_text(tmp_path: Path) -> None:
    """Some 50, most of them while the index of the store is written."""
    peaks = []
    for passages in (10_000, 25_000):
        written(tmp_path / str(passages), passages, traced=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 15_000 < 60, peaks
