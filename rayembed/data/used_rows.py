"""Which of the rows that were read are used: so many of each dataset, and of small datasets all or none."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from rayembed.config.data import DatasetConfig
from rayembed.config.wording import counted
from rayembed.data.problems import Problem, Report
from rayembed.data.store import Row, Store, chunks

ROWS_AT_A_TIME = 1024
LEFT_OUT = "small datasets, left out"


class Small(NamedTuple):
    """What is done with small datasets: fewer rows than `threshold`."""

    folders: Mapping[str, str]
    """The folder of each dataset that is a file of a folder in data.train."""

    threshold: int
    drop_threshold: int
    """Fewer rows than this of all small datasets of a folder are left out too."""


def drawn(rows: Store, max_rows: int, seed: int, report: Report) -> Iterator[Row]:
    """At most max_rows rows of each dataset: those whose hash with the seed is smallest, in their order."""
    largest: dict[str, list[tuple[int, int]]] = {}  # of each dataset: the kept hashes, negated, and row numbers
    number = 0
    for part in rows.iter_parts(["dataset"]):
        for name in part.column("dataset").to_pylist():
            digest = hashlib.blake2b(f"{seed} {name} {number}".encode(), digest_size=8).digest()
            entry = (-int.from_bytes(digest, "little"), number)
            kept = largest.setdefault(name, [])
            (heapq.heappush if len(kept) < max_rows else heapq.heappushpop)(kept, entry)
            number += 1
    chosen = sorted(row for kept in largest.values() for _, row in kept)
    report.count("rows drawn", len(chosen))
    for some in chunks(chosen, ROWS_AT_A_TIME):
        yield from rows.take(np.array(some)).to_pylist()


def settled(rows: Store, small: Small, prompts: Sequence[DatasetConfig], report: Report) -> Iterator[Row]:
    """The rows of datasets that are not too small, each with its own prompt or that of its dataset.

    Args:
        rows: all rows.
        small: see names_of.
        prompts: entries of data.datasets; the first with a prompt that matches a dataset is its own.
        report: takes what is left out.
    """
    counts: Counter[str] = Counter()
    for part in rows.iter_parts(["dataset"]):
        counts.update(part.column("dataset").to_pylist())
    names = names_of(counts, small)
    for name, new in names.items():
        if new is None:
            least = "data.drop_threshold" if name in small.folders else "data.small_threshold"
            report.warn(LEFT_OUT, Problem(name, None, least, f"{counted(counts[name], 'row')}, too few; left out"))
            report.count(f"rows of {LEFT_OUT}", counts[name])
    if counts and not any(names.values()):
        message = "leaves no dataset; lower it, or set it to 0"
        report.error("no rows", Problem("data.train", None, "data.small_threshold", message))
    prompt_of = {new: entry_of(prompts, new, "prompt") for new in names.values() if new is not None}
    for part in rows.iter_parts():
        for row in part.to_pylist():
            new = names[row["dataset"]]
            if new is not None:
                yield {**row, "dataset": new, "prompt": row["prompt"] or prompt_of[new]}


def names_of(counts: Mapping[str, int], small: Small) -> dict[str, str | None]:
    """The dataset that each dataset's rows go to: itself, `FOLDER/(small)` or, where they are left out, None.

    Args:
        counts: rows of each dataset.
        small: datasets below the threshold that are of one folder are put together; the others are left out.

    Source: FlagEmbedding's small_threshold and drop_threshold.
    """
    few = {name for name, number in counts.items() if number < small.threshold}
    together: Counter[str] = Counter()
    for name in few & small.folders.keys():
        together[small.folders[name]] += counts[name]
    kept = {folder: f"{folder}/(small)" for folder, number in together.items() if number >= small.drop_threshold}
    return {name: kept.get(small.folders.get(name, "")) if name in few else name for name in counts}


def entry_of(entries: Sequence[DatasetConfig], dataset: str, setting: str) -> object:
    """What data.datasets says of a setting of a dataset: the first value of the entries that match; None: nothing."""
    values = (getattr(entry, setting) for entry in entries if fnmatchcase(dataset, entry.name))
    return next((value for value in values if value is not None), None)
