"""Training rows as token ids on disk, memory-mapped: tokenised once, ahead of training and outside its processes.

A part of the row store becomes two Arrow files: `texts-*.arrow` (each different text of the part once) and
`rows-*.arrow` (which texts are a row's query, positives and negatives, and the teacher's scores). Texts that are only
encoded (a dev split) are one file a part, with their ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayembed.config.model import ModelConfig
from rayembed.data.mirror import all_here, folder_here, here
from rayembed.data.prompts import ALIKE, passage_of_row, query_of_row
from rayembed.data.storage import whole_file

TEXTS = pa.schema([("tokens", pa.list_(pa.int32()))])
ROWS = pa.schema(
    [
        ("query", pa.int32()),
        ("pos", pa.list_(pa.int32())),
        ("neg", pa.list_(pa.int32())),
        ("pos_scores", pa.list_(pa.float64())),
        ("neg_scores", pa.list_(pa.float64())),
    ]
)
TEXTS_WITH_IDS = pa.schema([("id", pa.string()), *TEXTS])
Tokenize = Callable[[Sequence[str], int], list[list[int]]]


def write_tokens(
    rows: pa.Table,
    folder: Path,
    part: str,
    *,
    model: ModelConfig,
    tokenize: Tokenize,
    tokenize_query: Tokenize | None = None,
    query_max_len: int,
    passage_max_len: int,
) -> dict[str, int]:
    """Tokenises one part of a row store and writes its two files.

    Args:
        rows: table with store.ROWS' columns.
        folder: where the files go.
        part: name in the files' names.
        model: instructions and formats.
        tokenize: texts and a length to token ids.
        tokenize_query: the same for queries, and for passages of symmetric types. None: as all texts.
        query_max_len: tokens kept of a query.
        passage_max_len: tokens kept of a passage.

    Returns:
        Counts: rows, texts, tokens, and texts that fill their length (most of these were cut).
    """
    table = rows.select(["query", "prompt", "pos", "neg", "pos_scores", "neg_scores", "type"]).to_pylist()
    queries: dict[str, int] = {}
    passages: dict[tuple[bool, str], int] = {}  # read as a query is, and the text
    records = []
    for row in table:
        text = query_of_row(model, row["query"], row_type=row["type"], prompt=row["prompt"])
        query = queries.setdefault(text, len(queries))
        record = {"query": query, "pos_scores": row["pos_scores"], "neg_scores": row["neg_scores"]}
        for side in ("pos", "neg"):
            texts = [passage_of_row(model, text, row_type=row["type"], prompt=row["prompt"]) for text in row[side]]
            alike = tokenize_query is not None and row["type"] in ALIKE
            record[side] = [passages.setdefault((alike, text), len(passages)) for text in texts]
        records.append(record)
    query_ids = (tokenize_query or tokenize)(list(queries), query_max_len)
    passage_ids: list[list[int]] = [[]] * len(passages)
    for alike, call in ((False, tokenize), (True, tokenize_query or tokenize)):
        own = [(place, text) for (kind, text), place in passages.items() if kind == alike]
        ids = call([text for _, text in own], passage_max_len) if own else []
        for (place, _), found in zip(own, ids, strict=True):
            passage_ids[place] = found
    for record in records:  # passages come after the queries in the file
        for side in ("pos", "neg"):
            record[side] = [text + len(queries) for text in record[side]]
    texts = pa.table({"tokens": pa.array([*query_ids, *passage_ids], pa.list_(pa.int32()))}, schema=TEXTS)
    _write(texts, folder / f"texts-{part}.arrow")
    _write(pa.Table.from_pylist(records, schema=ROWS), folder / f"rows-{part}.arrow")
    return {
        "rows": len(records),
        "texts": len(texts),
        "tokens": sum(map(len, query_ids)) + sum(map(len, passage_ids)),
        "full_queries": sum(len(ids) >= query_max_len for ids in query_ids),
        "full_passages": sum(len(ids) >= passage_max_len for ids in passage_ids),
    }


def _write(table: pa.Table, path: Path) -> None:
    flat = table.combine_chunks()
    with (
        whole_file(path) as working,
        pa.OSFile(str(working), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as file,
    ):
        file.write_table(flat, max_chunksize=max(1, len(table)))  # one record batch: flat offsets


def write_texts(ids: Sequence[str], tokens: Sequence[Sequence[int]], folder: Path, part: str) -> dict[str, int]:
    """Writes texts with their ids, which `TextTokens` reads; parts are read in the order of their names."""
    lists = pa.array(tokens, pa.list_(pa.int32()))
    _write(pa.table({"id": list(ids), "tokens": lists}, schema=TEXTS_WITH_IDS), folder / f"texts-{part}.arrow")
    return {"texts": len(tokens), "tokens": sum(map(len, tokens))}


class TextTokens:
    """What `write_texts` wrote into a folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._table = pa.concat_tables([_read(path) for path in sorted(folder_here(folder).glob("texts-*.arrow"))])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def block(self, first: int, last: int) -> list[NDArray[np.int32]]:
        """Token ids of texts `first` to `last` - 1."""
        lists = self._table.column("tokens").slice(first, last - first).combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
        return [values[start:end] for start, end in pairwise(offsets)]

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Ids by the numbers of texts, in their shape."""
        found = self._table.column("id").take(pa.array(rows.ravel())).to_pylist()
        return np.array(found, np.object_).reshape(rows.shape)


@dataclass(frozen=True)
class TokenRow:
    """One training row as token ids."""

    query: NDArray[np.int32]
    pos: list[NDArray[np.int32]]
    neg: list[NDArray[np.int32]]
    pos_scores: NDArray[np.float64] | None
    neg_scores: NDArray[np.float64] | None


class _Part:
    def __init__(self, folder: Path, part: str) -> None:
        self.texts = _Lists(_read(folder / f"texts-{part}.arrow").column("tokens"))
        rows = _read(folder / f"rows-{part}.arrow")
        self.num_rows = rows.num_rows
        self.query = rows.column("query").chunk(0).to_numpy() if rows.num_rows else np.empty(0, np.int32)
        self.lists = {name: _Lists(rows.column(name)) for name in ("pos", "neg", "pos_scores", "neg_scores")}

    def row(self, index: int) -> TokenRow:
        pos, neg, pos_scores, neg_scores = (column[index] for column in self.lists.values())
        assert pos is not None
        assert neg is not None
        return TokenRow(
            self._text(self.query[index]),
            [self._text(text) for text in pos],
            [self._text(text) for text in neg],
            pos_scores,
            neg_scores,
        )

    def lengths(self) -> NDArray[np.int32]:
        """[num_rows] tokens of each row's longest text."""
        of_text = np.diff(self.texts.offsets).astype(np.int32)
        longest = of_text[self.query] if self.num_rows else np.empty(0, np.int32)
        for side in ("pos", "neg"):
            offsets = self.lists[side].offsets
            row = np.repeat(np.arange(self.num_rows), np.diff(offsets))
            np.maximum.at(longest, row, of_text[self.lists[side].values[offsets[0] : offsets[-1]]])
        return longest

    def _text(self, index: int) -> NDArray[np.int32]:
        tokens = self.texts[index]
        assert tokens is not None
        return tokens


class _Lists:
    """A list column as numpy views of the memory map."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        self.offsets = array.offsets.to_numpy()
        self.values = array.values.to_numpy(zero_copy_only=True)
        self.valid = None if array.null_count == 0 else np.asarray(array.is_valid())

    def __getitem__(self, index: int) -> NDArray[Any] | None:
        if self.valid is not None and not self.valid[index]:
            return None
        values: NDArray[Any] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return values


def _read(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(here(path)))).read_all()


class TokenStore:
    """The token files of all parts; rows are numbered as in the row store they were made of."""

    def __init__(self, folder: Path, parts: Sequence[str]) -> None:
        all_here(folder / f"{kind}-{part}.arrow" for part in parts for kind in ("texts", "rows"))
        self._parts = [_Part(folder, part) for part in parts]
        self._starts = np.cumsum([0, *(part.num_rows for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, row: int) -> TokenRow:
        """One row by its number."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._parts[part].row(row - int(self._starts[part]))

    def lengths(self) -> NDArray[np.int32]:
        """[len(self)] tokens of each row's longest text, its query and all passages counted."""
        return np.concatenate([np.empty(0, np.int32), *(part.lengths() for part in self._parts)])
