"""Tables on disk in parts: written as a stream, read memory-mapped, so no process holds the texts of a corpus.

A part is one unit of work of mining, scoring and evaluation. A table whose first column is `id` has an index beside it
of 16 bytes a row (a 64-bit hash and a row number, sorted by the hash), memory-mapped as well.
"""

import hashlib
import json
import shutil
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayembed.data.copies import shown
from rayembed.data.locks import give_back, take
from rayembed.data.mirror import here
from rayembed.data.storage import publish_folder, working_folder, write_atomic

T = TypeVar("T")
Row = dict[str, Any]
Int64s = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

PASSAGES = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)])
QUERIES = PASSAGES.append(pa.field("prompt", pa.string()))
ROWS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("pos", pa.list_(pa.string()), nullable=False),
        pa.field("pos_ids", pa.list_(pa.string())),
        pa.field("neg", pa.list_(pa.string()), nullable=False),
        pa.field("neg_ids", pa.list_(pa.string())),
        pa.field("pos_scores", pa.list_(pa.float64())),
        pa.field("neg_scores", pa.list_(pa.float64())),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("type", pa.string()),
        pa.field("related_ids", pa.list_(pa.string())),  # judged below data.min_grade: neither pos nor neg
        pa.field("label", pa.string()),  # of type class: rows of the same dataset and label are its positives
    ]
)


@dataclass(frozen=True)
class Part:
    """One file of a store: rows first_row to first_row + num_rows - 1 of the whole."""

    name: str
    first_row: int
    num_rows: int
    fingerprint: str


@dataclass(frozen=True)
class Store:
    """A table on disk that was written whole; rows are counted over all parts.

    `fingerprint` stands for all contents in order, however they are cut into parts.
    """

    folder: Path
    fingerprint: str
    parts: tuple[Part, ...]
    schema: pa.Schema

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open what a StoreWriter finished.

        Raises:
            FileNotFoundError: there is no store, or it was not finished.
        """
        path = here(folder / "store.json")
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no finished store (no store.json); run the job that writes it again"
            )
        value = json.loads(path.read_bytes())
        schema = pa.ipc.read_schema(pa.py_buffer(here(folder / "schema.arrow").read_bytes()))
        return cls(folder, value["fingerprint"], tuple(_parts(value["parts"])), schema)

    @property
    def layout(self) -> list[int]:
        """Rows of each part: how the table is cut into units of work, which its fingerprint does not say."""
        return [part.num_rows for part in self.parts]

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return self.parts[-1].first_row + self.parts[-1].num_rows if self.parts else 0

    def read_part(self, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The i-th part, memory-mapped: pages are read when they are used. `columns` None: all."""
        options = None
        if columns is not None:
            options = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(name) for name in columns])
        with pa.memory_map(str(here(self.folder / self.parts[i].name))) as file:
            return pa.ipc.open_file(file, options=options).read_all()

    def iter_parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every part in order, one at a time."""
        return (self.read_part(i, columns) for i in range(len(self.parts)))

    def take(self, rows: Int64s, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows by their number, in the given order, repeats included.

        Raises:
            IndexError: a number is negative or not below num_rows.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size == 0:
            empty = self.schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked of {self.folder}, which has {self.num_rows}")
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        part_of = np.searchsorted(self._first_rows, ascending, side="right") - 1
        parts, starts = np.unique(part_of, return_index=True)
        pieces = []
        for part, wanted in zip(parts, np.split(ascending, starts[1:]), strict=True):
            local = wanted - self._first_rows[part]
            pieces.append(self.read_part(int(part), columns).take(pa.array(local)))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The parts that have rows `first` to `last` - 1: which part, and from which of its rows to before which."""
        for i, part in enumerate(self.parts):
            if part.first_row < last and part.first_row + part.num_rows > first:
                yield i, max(first - part.first_row, 0), min(last - part.first_row, part.num_rows)

    def find_ids(self, ids: Sequence[str]) -> Int64s:
        """Row number of each id, -1 where it is absent; equal hashes are told apart by the ids themselves."""
        hashes, rows = self._index
        wanted = hash_texts(ids)
        at = np.searchsorted(hashes, wanted, side="left")
        end = np.searchsorted(hashes, wanted, side="right")
        found = np.full(len(ids), -1, dtype=np.int64)
        pending = np.flatnonzero(at < end)
        while pending.size:
            candidates = np.asarray(rows[at[pending]])
            names = self.take(candidates, columns=["id"]).column("id").to_pylist()
            hit = np.array([ids[i] == name for i, name in zip(pending.tolist(), names, strict=True)])
            found[pending[hit]] = candidates[hit]
            pending = pending[~hit]
            at[pending] += 1
            pending = pending[at[pending] < end[pending]]
        return found

    @cached_property
    def _first_rows(self) -> Int64s:
        return np.array([part.first_row for part in self.parts], dtype=np.int64)

    @cached_property
    def _index(self) -> tuple[Hashes, Int64s]:
        names = ("id_hashes.npy", "id_rows.npy")
        hashes, rows = (np.load(here(self.folder / name), mmap_mode="r") for name in names)
        return hashes, rows


class StoreWriter:
    """Writes a store part by part; the folder appears when finish() has written all of it.

    What an earlier, interrupted writer left is removed. Other files that belong to the store may be written into
    `working` before finish().
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_part: int) -> None:
        self.folder = folder
        self.schema = schema
        self.rows_per_part = rows_per_part
        self.working = working_folder(folder)
        self._rows: list[Row] = []
        self._parts: list[Part] = []
        self._hashes = array("Q") if schema.names[0] == "id" else None
        self._sha = hashlib.sha256(",".join(schema.names).encode())
        self._part_sha = hashlib.sha256()
        lock = folder.parent / ".locks" / folder.name  # experiments with one cache may want the same store at once
        take(lock, waiting=f"{shown(folder)} is being written by another command; waiting for it")
        self._give_back = weakref.finalize(self, give_back, lock)
        shutil.rmtree(self.working, ignore_errors=True)
        self.working.mkdir(parents=True)

    def add(self, row: Row) -> None:
        """Append a row; a column that it lacks becomes null."""
        self._rows.append(row)
        content = json.dumps([row.get(name) for name in self.schema.names], ensure_ascii=False).encode() + b"\n"
        self._sha.update(content)
        self._part_sha.update(content)
        if self._hashes is not None:
            self._hashes.append(hash_text(row["id"]))
        if len(self._rows) == self.rows_per_part:
            self._write_part()

    def finish(self) -> Store:
        """Write what is left, and give the folder its final name.

        Raises:
            FileExistsError: the folder is there already, with other rows.
        """
        if self._rows:
            self._write_part()
        if self._hashes is not None:
            hashes = np.array(self._hashes, dtype=np.uint64)
            order = np.argsort(hashes, kind="stable")
            np.save(self.working / "id_hashes.npy", hashes[order])
            np.save(self.working / "id_rows.npy", order.astype(np.int64))
        (self.working / "schema.arrow").write_bytes(self.schema.serialize())
        parts = [{"name": p.name, "rows": p.num_rows, "fingerprint": p.fingerprint} for p in self._parts]
        value = {"fingerprint": self._sha.hexdigest()[:16], "parts": parts}
        write_atomic(self.working / "store.json", json.dumps(value, indent=1).encode())
        if (self.folder / "store.json").exists() and Store.open(self.folder).fingerprint == value["fingerprint"]:
            shutil.rmtree(self.working)  # the command that this one waited for was quicker
        else:
            publish_folder(self.folder)
        self._give_back()
        return Store.open(self.folder)

    def _write_part(self) -> None:
        name = f"part-{len(self._parts):05d}.arrow"
        table = pa.Table.from_pylist(self._rows, schema=self.schema)
        with pa.OSFile(str(self.working / name), "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
            writer.write_table(table)
        first = self._parts[-1].first_row + self._parts[-1].num_rows if self._parts else 0
        self._parts.append(Part(name, first, len(self._rows), self._part_sha.hexdigest()[:16]))
        self._rows = []
        self._part_sha = hashlib.sha256()


class SeenHashes:
    """64-bit hashes met so far, 8 bytes each: sorted runs, a longer one before each shorter one."""

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def add(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Whether each was met before, in an earlier call or earlier in this one; then count all as met."""
        met = np.ones(len(hashes), dtype=np.bool_)
        met[np.unique(hashes, return_index=True)[1]] = False
        met |= self.holds(hashes)
        new = np.sort(hashes[~met])
        while self._runs and len(self._runs[-1]) <= 2 * len(new):
            new = np.sort(np.concatenate([self._runs.pop(), new]), kind="stable")
        if len(new):
            self._runs.append(new)
        return met

    def holds(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Whether each was met; none of them counts as met for it."""
        met = np.zeros(len(hashes), dtype=np.bool_)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            met |= run[at] == hashes
        return met


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def hash_text(text: str) -> int:
    """64-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_texts(texts: Iterable[str]) -> Hashes:
    """[N] uint64: the hash of each text."""
    return np.fromiter((hash_text(text) for text in texts), dtype=np.uint64)


def _parts(values: list[dict[str, Any]]) -> Iterator[Part]:
    first = 0
    for value in values:
        yield Part(value["name"], first, value["rows"], value["fingerprint"])
        first += value["rows"]
