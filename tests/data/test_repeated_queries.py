"""Positives of a query are gathered from all of its rows, wherever they lie."""

import random
from pathlib import Path

import numpy as np
import pytest

from rayembed.data import repeated_queries
from rayembed.data.repeated_queries import RepeatedQueries
from rayembed.data.store import ROWS, Row, Store, StoreWriter


def stored(folder: Path, rows: list[Row]) -> Store:
    writer = StoreWriter(folder, ROWS, 4)
    for row in rows:
        writer.add({"query_id": row["query"], "neg": [], "dataset": "d", **row})
    return writer.finish()


def triplets(number: int, queries: int) -> list[Row]:
    """Queries that come up once, twice or often, in any order."""
    rng = random.Random(number)
    return [
        {
            "query": f"q{rng.randrange(queries)}",
            "pos": [f"text {i}"],
            "pos_ids": [f"p{i}"] if i % 3 else None,
            "related_ids": [f"r{i}", f"r{i + 1}"] if i % 2 else None,
        }
        for i in range(number)
    ]


def check(store: Store, rows: list[Row]) -> None:
    repeated = RepeatedQueries(store, str.strip)
    found = [row for part in store.iter_parts() for row in repeated.with_positives_of_all(part.to_pylist())]
    for row, own in zip(found, rows, strict=True):
        same = [other for other in rows if other["query"].strip() == own["query"].strip()]
        assert row["query"] == own["query"]
        assert row["pos"][0] == own["pos"][0], "its own come first"
        assert sorted(row["pos"]) == sorted({text for other in same for text in other["pos"]})
        for column in ("pos_ids", "related_ids"):
            assert sorted(row[column]) == sorted({name for other in same for name in other.get(column) or ()})


@pytest.mark.parametrize(("number", "queries"), [(1, 1), (9, 1), (30, 10), (60, 40), (13, 10_000)])
def test_positives_of_all_rows_of_a_query(tmp_path: Path, number: int, queries: int) -> None:
    rows = triplets(number, queries)
    check(stored(tmp_path / "s", rows), rows)


def test_queries_that_are_mapped_to_one_text_are_one(tmp_path: Path) -> None:
    rows = [
        {"query": "what ", "pos": ["a", "b"], "pos_ids": ["1", "2"]},
        {"query": "who", "pos": ["c"], "pos_ids": ["3"]},
        {"query": " what", "pos": ["b", "d"], "pos_ids": ["2", "4"]},
    ]
    check(stored(tmp_path / "s", rows), rows)


def test_queries_of_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_queries, "hash_texts", lambda texts: np.array([7 for _ in texts], np.uint64))
    rows = triplets(20, 8)
    check(stored(tmp_path / "s", rows), rows)
