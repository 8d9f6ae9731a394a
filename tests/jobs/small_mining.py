"""A few training rows and a small corpus whose vectors are made up, so that every score is exact and many tie."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.data.store import PASSAGES, ROWS, Row, Store, StoreWriter
from rayembed.jobs.pools import Mining, absent_positives
from rayembed.jobs.ranking import search_shards
from rayembed.jobs.vector_files import Vectors

DIMENSION = 6
WORDS = [first + second for first in "bdfgklm" for second in ("ara", "eno", "iki", "olu")]


def vector(text: str) -> NDArray[np.float32]:
    """[D] multiples of 1/4, so that products of two are multiples of 1/16 and float32 adds them up without an error."""
    rng = np.random.default_rng(list(text.encode()))
    return rng.integers(-2, 3, DIMENSION).astype(np.float32) / np.float32(4)


def product(one: str, other: str) -> float:
    """The score of two texts."""
    return float(sum(a * b for a, b in zip(vector(one).tolist(), vector(other).tolist(), strict=True)))


def texts(number: int, seed: int, *, words: int = 6) -> list[str]:
    """Different texts."""
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, words)) for _ in range(number)]


def row(number: int, query: str, positives: Mapping[str, str], **others: Any) -> Row:  # noqa: ANN401 - columns
    """A training row; `positives` are texts by id."""
    pos = {"pos": list(positives.values()), "pos_ids": list(positives)}
    return {"query_id": f"q{number}", "query": query, **pos, "neg": [], "dataset": "toy", **others}


@dataclass(frozen=True)
class World:
    """Rows and passages by id."""

    rows: list[Row]
    passages: dict[str, str]
    cut: tuple[int, int] = (1000, 1000)
    """Rows of a part of the rows, passages of a part of the corpus."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of section mine."""

    def experiment(self, folder: Path) -> Experiment:
        """With a teacher that nobody asks."""
        return Experiment(
            output_dir=str(folder),
            model={"name_or_path": "none"},  # type: ignore[arg-type] # pydantic reads the dicts
            score={"model": "none"},  # type: ignore[arg-type]
            search={"passages_per_unit": self.cut[1], "queries_per_unit": 7},  # type: ignore[arg-type]
            mine=MineConfig(**self.settings),
        )

    def mining(self, folder: Path) -> Mining:
        """What the passes read, with the rankings; all of it in `folder`."""
        experiment = self.experiment(folder)
        assert experiment.mine is not None
        rows = stored(folder / "rows", ROWS, self.rows, self.cut[0])
        passages = [{"id": name, "text": text} for name, text in self.passages.items()]
        corpus = stored(folder / "corpus", PASSAGES, passages, self.cut[1])
        absent = absent_positives(experiment, rows, corpus)
        queries, vectors = with_vectors(rows, "query"), with_vectors(corpus, "text")
        last = int(experiment.mine.range_for_sampling.split("-")[1])
        tops = search_shards(experiment, queries, vectors, last)
        missing = None if absent is None else with_vectors(absent, "text")
        return Mining(experiment, experiment.mine, rows, corpus, queries, vectors, missing, tops)


def stored(folder: Path, schema: pa.Schema, rows: Sequence[Row], rows_per_part: int) -> Store:
    """A store of these rows."""
    writer = StoreWriter(folder, schema, rows_per_part)
    for one in rows:
        writer.add(one)
    return writer.finish()


def with_vectors(store: Store, column: str) -> Vectors:
    """Vectors of the texts in a column."""
    folder = store.folder.with_name(f"{store.folder.name}-vectors")
    folder.mkdir()
    for index, part in enumerate(store.iter_parts([column])):
        np.save(folder / f"part-{index:05d}.npy", np.stack([vector(text) for text in part.column(column).to_pylist()]))
    return Vectors(folder, store)
