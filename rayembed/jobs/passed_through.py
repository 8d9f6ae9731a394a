"""Rows that bring what they are trained with (types sts and class): mining and scoring pass them through as they are.

What is mined and scored are the rows of retrieval, by themselves, so that their results are those of an experiment
without the others; in the files all rows stand in their order again.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayembed.config.wording import counted
from rayembed.data.storage import fingerprint, whole_file
from rayembed.data.store import Row, Store, StoreWriter
from rayembed.data.tasks import OF_OWN_KIND
from rayembed.jobs.units import Unit


def passed_through(rows: Store, job: str) -> dict[str, int]:
    """How many rows of each dataset a job passes through.

    Args:
        rows: training rows.
        job: names the section that has nothing to do where it passes all of them.

    Raises:
        ValueError: no row is of retrieval.
    """
    counts: Counter[str] = Counter()
    for part in rows.iter_parts(["type", "dataset"]):
        counts.update(part.filter(pa.array(of_own_kind(part))).column("dataset").to_pylist())
    if rows.num_rows and counts.total() == rows.num_rows:
        raise ValueError(
            f"all {rows.num_rows:,} training rows are of the types {' and '.join(OF_OWN_KIND)}, which bring what they "
            f"are trained with, so there is nothing to {job}; remove the section {job}, or add rows of retrieval to "
            "data.train"
        )
    return dict(sorted(counts.items()))


def in_words(passed: Mapping[str, int]) -> str:
    """For the log and --dry-run; empty where nothing is passed through."""
    if not passed:
        return ""
    each = ", ".join(f"{name} {count:,}" for name, count in passed.items())
    return (
        f"{counted(sum(passed.values()), 'row')} of types {' and '.join(OF_OWN_KIND)} pass through as they are ({each})"
    )


def retrieval_rows(rows: Store, cache: Path, rows_per_part: int) -> Store:
    """The rows of retrieval as a store of their own; `rows` itself where there are no others."""
    if not any(of_own_kind(part).any() for part in rows.iter_parts(["type"])):
        return rows
    folder = cache / f"retrieval-{fingerprint([rows.fingerprint, rows_per_part])}"
    if (folder / "store.json").exists():
        return Store.open(folder)
    writer = StoreWriter(folder, rows.schema, rows_per_part)
    for part in rows.iter_parts():
        for row in part.filter(pa.array(~of_own_kind(part))).to_pylist():
            writer.add(row)
    return writer.finish()


def units_with_others(rows: Store, retrieval: Store) -> list[Unit]:
    """A unit a part of the rows of retrieval, with the other rows that stand before the next part's first row."""
    kinds = [np.empty(0, np.bool_), *(of_own_kind(part) for part in rows.iter_parts(["type"]))]
    numbers = np.flatnonzero(~np.concatenate(kinds))
    starts = [0, *(int(numbers[part.first_row]) for part in retrieval.parts[1:]), rows.num_rows]
    return [
        Unit(f"part-{i:05d}", part.num_rows, {"part": i, "first": starts[i], "last": starts[i + 1]})
        for i, part in enumerate(retrieval.parts)
    ]


def with_others(rows: Store, first: int, last: int, lines: Iterable[str]) -> Iterator[str]:
    """A line a row for rows `first` to `last` - 1: the others' as they are, those of retrieval from `lines`."""
    of_retrieval = iter(lines)
    for stored, start, stop in rows.pieces(first, last):
        part = rows.read_part(stored).slice(start, stop - start)
        passed = of_own_kind(part)
        others = map(row_line, part.filter(pa.array(passed)).to_pylist())
        for passes in passed.tolist():
            yield next(others) if passes else next(of_retrieval)
    assert next(of_retrieval, None) is None, "a row of retrieval stands elsewhere"


def of_own_kind(table: pa.Table) -> NDArray[np.bool_]:
    """[N] whether a row brings what it is trained with."""
    kinds = pc.is_in(table.column("type"), value_set=pa.array(OF_OWN_KIND))
    found: NDArray[np.bool_] = kinds.to_numpy()
    return found


def row_line(row: Row) -> str:
    """A row as JSON, which the reader of training rows makes the same row of."""
    return json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a local file a line at a time, so that it is there in full or not at all."""
    with whole_file(path) as working, working.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
