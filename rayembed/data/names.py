"""Ids that stand for one text each, though data sets number their queries and passages from 1 without each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayembed.data.fields import passage_id
from rayembed.data.problems import Problem, Report
from rayembed.data.storage import SUFFIXES, identity
from rayembed.data.store import Row, SeenHashes, Store, chunks, hash_texts
from rayembed.data.tasks import OF_OWN_KIND

Flags = npt.NDArray[np.bool_]
NO_IN_BATCH_NEG = "no_in_batch_neg"
ROWS_AT_A_TIME = 256  # rows whose passages are looked up together


@dataclass(frozen=True, slots=True)
class Name:
    """The id that a text goes by.

    `met`: the id stood for this text before. `conflict`: it cannot be used, as its own source has it for another text.
    """

    name: str
    met: bool
    conflict: bool


class Names:
    """Gives an id that another source has for another text the name of its own source: `SOURCE:ID`.

    Who comes first keeps the bare id. Holds 24 bytes an id.
    """

    def __init__(self) -> None:
        self._ids = SeenHashes()
        self._pairs = SeenHashes()  # id and text of whoever had the id first
        self._claims = SeenHashes()  # source and id, of those that go by the bare id

    def settle(self, batch: Sequence[tuple[str, str, str]]) -> list[Name]:
        """The name of each (source, id, text), given all those of earlier calls."""
        met, kept = self._take([name for _, name, _ in batch], [text for _, _, text in batch])
        own = hash_texts(f"{source}\0{name}" for source, name, _ in batch)
        self._claims.add(own[kept])
        conflict = ~kept & self._claims.holds(own)
        moved = np.flatnonzero(~kept & ~conflict)
        names = [name for _, name, _ in batch]
        for i in moved.tolist():
            names[i] = f"{batch[i][0]}:{names[i]}"
        met[moved], fits = self._take([names[i] for i in moved.tolist()], [batch[i][2] for i in moved.tolist()])
        conflict[moved] = ~fits
        return [Name(name, bool(met[i]), bool(conflict[i])) for i, name in enumerate(names)]

    def _take(self, names: Sequence[str], texts: Sequence[str]) -> tuple[Flags, Flags]:
        """Whether each id was met before, and whether it stands for this text; new ids do from now on."""
        pairs = hash_texts(f"{name}\0{text}" for name, text in zip(names, texts, strict=True))
        met = self._ids.add(hash_texts(names))
        self._pairs.add(pairs[~met])
        return met, self._pairs.holds(pairs)


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """A short name of each path: as many of its last parts as it takes to tell them apart, without the ending.

    They are the same however a path is written, and wherever the folder that holds them all is.
    """
    known = {path: identity(path).rstrip("/") for path in paths}
    parts = {whole: whole.split("/") for whole in known.values()}
    for number in range(1, max((len(each) for each in parts.values()), default=1) + 1):
        tails = {whole: "/".join(each[-number:]) for whole, each in parts.items()}
        for short in ({whole: _stem(tail) for whole, tail in tails.items()}, tails):
            if len(set(short.values())) == len(short) and all(short.values()):
                return {path: short[whole] for path, whole in known.items()}
    return known


def dataset_names(paths: Sequence[str]) -> dict[str, str]:
    """As source_names; a folder whose name ends in no_in_batch_neg is in the names of its files too."""
    names = source_names(paths)
    for path, name in names.items():
        folder = identity(path).rstrip("/").split("/")[-2:-1]
        if "/" not in name and folder and folder[0].endswith(NO_IN_BATCH_NEG):
            names[path] = f"{folder[0]}/{name}"
    return names


def says_no_in_batch_neg(dataset: str) -> bool:
    """Whether the name of a file or of its folder says that its queries compete with their own group alone."""
    return any(_stem(part).endswith(NO_IN_BATCH_NEG) for part in dataset.split("/")[-2:])


def with_ids_of(corpus: Store, rows: Sequence[Row], sources: Sequence[str]) -> Iterator[Row]:
    """Rows whose passages have the ids that their texts have in the corpus.

    Related passages have no text in the row. They get every id that may be theirs: at worst, a passage of another
    source that has the same number is not mined for the query.

    Args:
        corpus: passages, of which some have `SOURCE:ID` as their id.
        rows: training rows; an id that stands for its text in the corpus stays, and one that is not found does too.
        sources: names that may be before an id, besides the row's own dataset.
    """
    for some in chunks(rows, ROWS_AT_A_TIME):
        asked = {
            option
            for row in some
            for side in ("pos_ids", "neg_ids", "related_ids")
            for name in row.get(side) or ()
            for option in _options(name, row, sources)
        }
        ids = sorted(asked)
        found = corpus.find_ids(ids)
        texts = corpus.take(found[found >= 0], ["id", "text"]).to_pydict()
        text_of = dict(zip(texts["id"], texts["text"], strict=True))
        for row in some:
            changed = {
                f"{side}_ids": [
                    next((o for o in _options(name, row, sources) if text_of.get(o) == text), name)
                    for name, text in zip(row[f"{side}_ids"], row[side], strict=True)
                ]
                for side in ("pos", "neg")
            }
            if row.get("related_ids"):
                related = [(name, _options(name, row, sources)) for name in row["related_ids"]]
                changed["related_ids"] = [
                    known for name, options in related for known in [o for o in options if o in text_of] or [name]
                ]
            yield {**row, **changed}


def note_absent_positives(rows: Store, corpus: Store, report: Report) -> None:
    """Warn of positives whose id the corpus has not: they are not found there, nor kept out of the negatives by id.

    Ids that were made of the texts are compared with a corpus of such ids alone: with others they cannot agree.
    """
    number = 0
    first = corpus.take(np.arange(min(1, corpus.num_rows))).to_pylist()
    made = all(row["id"] == passage_id(row["text"]) for row in first)
    for part in rows.iter_parts(["query_id", "pos", "pos_ids", "dataset", "type"]):
        table = part.to_pylist()
        wanted = [
            (row, number + i, name)
            for i, row in enumerate(table, 1)
            if row["type"] not in OF_OWN_KIND  # these are not searched for
            for name, text in zip(row["pos_ids"], row["pos"], strict=True)
            if made or name != passage_id(text)
        ]
        number += len(table)
        for i in np.flatnonzero(corpus.find_ids([name for _, _, name in wanted]) < 0):
            row, line, name = wanted[i]
            message = f"{name!r}, of query {row['query_id']!r} of {row['dataset']}, is not in data.corpus"
            report.warn("positives that are not in the corpus by id", Problem("training rows", line, "pos", message))


def _options(name: str, row: Row, sources: Sequence[str]) -> list[str]:
    return [name, *(f"{source}:{name}" for source in dict.fromkeys([row["dataset"], *sources]))]


def _stem(tail: str) -> str:
    return next((tail.removesuffix(ending) for ending in SUFFIXES if tail.endswith(ending)), tail)
