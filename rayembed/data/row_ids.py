"""Rows of a store by the ids in a column, also one that has no index beside it and repeats ids (query_id of rows)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rayembed.data.mirror import here
from rayembed.data.storage import save_npy
from rayembed.data.store import Int64s, Store, hash_texts

HASHES, ROWS = "ids.hashes.npy", "ids.rows.npy"


def write_index(store: Store, column: str, folder: Path) -> None:
    """Leaves hashes of the ids, sorted, and their rows in a folder, unless they are there or the store has its own."""
    if store.schema.names[0] == column == "id" or (folder / ROWS).exists():
        return
    hashes = np.concatenate([hash_texts(part.column(column).to_pylist()) for part in store.iter_parts([column])])
    order = np.argsort(hashes, kind="stable")
    save_npy(folder / HASHES, hashes[order])
    save_npy(folder / ROWS, order.astype(np.int64))  # the later of the two: where it is, both are


def rows_of_ids(store: Store, column: str, folder: Path, ids: Sequence[str]) -> tuple[Int64s, Int64s]:
    """Places in `ids` and the rows that have these ids, of the same number; an id may have no row, or several.

    Args:
        store: of any schema.
        column: of the ids.
        folder: where `write_index` left the index.
        ids: to look for.
    """
    if store.schema.names[0] == column == "id":
        rows = store.find_ids(ids)
        at = np.flatnonzero(rows >= 0)
        return at, rows[at]
    hashes, row_of = (np.load(here(folder / name), mmap_mode="r") for name in (HASHES, ROWS))
    wanted = hash_texts(ids)
    first = np.searchsorted(hashes, wanted, side="left")
    counts = np.searchsorted(hashes, wanted, side="right") - first
    at = np.repeat(np.arange(len(ids)), counts)
    within = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.asarray(row_of[first[at] + within])
    names = store.take(rows, [column]).column(column).to_pylist()
    same = np.array([ids[i] == name for i, name in zip(at.tolist(), names, strict=True)], np.bool_)
    return at[same], rows[same]
