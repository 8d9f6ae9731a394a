"""From rankings to pools: for every training row, the candidates that the filters left, and how its positives score.

A pool is small arrays on disk (28 bytes a candidate), a file a part of the rows. Texts are read some queries at a time,
so memory does not depend on the corpus; of the rows a worker holds 16 bytes each, where their query is repeated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.data.mirror import here
from rayembed.data.repeated_queries import RepeatedQueries
from rayembed.data.storage import fingerprint
from rayembed.data.store import PASSAGES, Row, SeenHashes, Store, StoreWriter, hash_text, hash_texts
from rayembed.jobs.pool_files import Pools
from rayembed.jobs.ranking import ShardTops
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors
from rayembed.mining.filters import Candidates, Query, apply_filters, filters_of, same_text
from rayembed.mining.selection import draw_order, query_seed

VERSION = 3  # raise it when the same settings leave other candidates, so that pools of older code are not used
BY_TEXT = "known_by_text.npz"
QUERIES_AT_ONCE = 64  # whose candidates' texts are in memory together
SETTINGS = (  # of section mine that decide what a pool holds
    *("range_for_sampling", "sampling_strategy", "min_score", "max_score", "absolute_margin", "relative_margin"),
    *("margin_positive", "near_duplicate"),
)


def window(config: MineConfig) -> tuple[int, int]:
    """First rank of the window, and the one after its last."""
    first, last = map(int, config.range_for_sampling.split("-"))
    return first, last


@dataclass(frozen=True)
class Mining:
    """What the passes of mining read."""

    experiment: Experiment
    """Its section mine is there."""

    config: MineConfig
    rows: Store
    corpus: Store
    queries: Vectors
    passages: Vectors

    absent: Vectors | None
    """Of the positives that the corpus lacks. None: it lacks none, or they cannot be encoded."""

    tops: Path


def make_pools(mining: Mining) -> Path:
    """Filters the candidates of all rows.

    Returns:
        The folder, in the cache.
    """
    settings = asdict(mining.config)
    depends_on = [
        *(mining.rows.fingerprint, mining.rows.layout, mining.corpus.fingerprint, mining.tops.name),
        *(mining.queries.folder.name, mining.passages.folder.name, mining.absent and mining.absent.folder.name),
        *({key: settings[key] for key in SETTINGS}, mining.experiment.seed, VERSION),
    ]
    folder = Path(mining.experiment.cache()) / f"pools-{fingerprint(depends_on)}"
    work = Work(
        what="filter candidates",
        counted="queries",
        worker="rayembed.jobs.pools:PoolWorker",
        arguments={
            "experiment": shipped(mining.experiment),
            **{name: str(getattr(mining, name).folder) for name in ("rows", "corpus", "queries", "passages")},
            "absent": mining.absent and [str(mining.absent.folder), str(mining.absent.store.folder)],
            "tops": str(mining.tops),
            "by_text": str(known_by_text(mining.experiment, mining.rows, mining.corpus)),
        },
        folder=folder,
        light=True,
    )
    run_units(row_units(mining.rows), work, mining.experiment.ray, use_gpu=False)
    return folder


def row_units(rows: Store) -> list[Unit]:
    """A unit a part of the training rows."""
    return [Unit(f"part-{i:05d}", part.num_rows, {"part": i}) for i, part in enumerate(rows.parts)]


class PoolWorker:
    """Merges the shards' rankings for a part of the rows and filters them."""

    def __init__(
        self,
        *,
        experiment: str,
        rows: str,
        corpus: str,
        queries: str,
        passages: str,
        absent: list[str] | None,
        tops: str,
        by_text: str,
        threads: int,
        use_gpu: bool,
    ) -> None:
        self._experiment = received(experiment)
        self._config = self._experiment.mine or MineConfig()
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._queries = Vectors(Path(queries), self._rows)
        self._positives = PositiveScores(Vectors(Path(passages), self._corpus), absent, Path(by_text))
        self._tops = ShardTops(Path(tops), self._corpus)
        self._repeated = RepeatedQueries(self._rows, same_text)
        self._filters = filters_of(self._config)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the pools of one part."""
        part = self._rows.parts[spec["part"]]
        table = self._rows.read_part(spec["part"]).to_pylist()
        known = self._repeated.with_positives_of_all(table)
        found: list[_Pool] = []
        for start in range(0, part.num_rows, QUERIES_AT_ONCE):
            found += self._some(part.first_row + start, table[start:], known[start : start + QUERIES_AT_ONCE])
        _pools(found).save(folder, spec["part"])
        return {"candidates": sum(len(pool.left.ids) for pool in found)}

    def _some(self, first_row: int, table: list[Row], known: list[Row]) -> Iterator["_Pool"]:
        last_row = first_row + len(known)
        vectors = self._queries.rows(first_row, last_row)
        merged = self._tops.merged(first_row, last_row, window(self._config)[1])
        passages = Passages(self._corpus, np.concatenate([rows for _, rows in merged]))
        own = self._positives.of(vectors, table[: len(known)])
        everyones = self._positives.of_all(vectors, known)
        first_rank, _ = window(self._config)
        for i, (scores, rows) in enumerate(merged):
            ids, texts = passages.of(rows)
            all_of_it = Candidates(rows, ids, texts, np.arange(len(rows)), scores)
            positive = measured_from(everyones[i], self._config)
            left, dropped = apply_filters(self._filters, query_of(known[i], positive), all_of_it)
            rng = np.random.default_rng(query_seed(self._experiment.seed, known[i]["query_id"]))
            order = draw_order(left.ranks, strategy=self._config.sampling_strategy, rng=rng)
            before = scores[:first_rank]
            yield _Pool(
                left,
                order,
                own[i],
                float("nan") if positive is None else positive,
                float(before[-1]) if len(before) else float("inf"),
                [dropped[name] for name in self._filters],
            )


@dataclass(frozen=True)
class _Pool:
    """Of one row: a row of each array of Pools."""

    left: Candidates
    order: NDArray[np.int64]
    own: list[float]
    positive: float
    ceiling: float
    dropped: list[int]


def _pools(found: Sequence[_Pool]) -> Pools:
    def ends(lengths: list[int]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    return Pools(
        offsets=ends([len(pool.left.ids) for pool in found]),
        rows=np.concatenate([pool.left.rows for pool in found]),
        ranks=np.concatenate([pool.left.ranks for pool in found]),
        scores=np.concatenate([pool.left.scores for pool in found]),
        order=np.concatenate([pool.order for pool in found]),
        positive_offsets=ends([len(pool.own) for pool in found]),
        positive_scores=np.array([score for pool in found for score in pool.own], np.float32),
        positive=np.array([pool.positive for pool in found], np.float32),
        ceiling=np.array([pool.ceiling for pool in found], np.float32),
        dropped=np.array([pool.dropped for pool in found], np.int64).reshape(len(found), -1),
    )


class Passages:
    """Ids and texts of some passages of the corpus, each read once."""

    def __init__(self, corpus: Store, rows: NDArray[np.int64]) -> None:
        self._rows = np.unique(rows)
        table = corpus.take(self._rows, ["id", "text"])
        self._ids, self._texts = table.column("id").to_pylist(), table.column("text").to_pylist()

    def of(self, rows: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        """Ids and texts by row number."""
        places = np.searchsorted(self._rows, rows).tolist()
        return [self._ids[place] for place in places], [self._texts[place] for place in places]


def query_of(row: Row, positive_score: float | None) -> Query:
    """What filters may know of a row that has the positives of all rows with its query."""
    return Query(
        text=row["query"],
        positive_ids=frozenset(row["pos_ids"] or ()),
        positive_texts=tuple(row["pos"]),
        positive_score=positive_score,
        related_ids=frozenset(row.get("related_ids") or ()),
    )


def measured_from(scores: Sequence[float], config: MineConfig) -> float | None:
    """The positives' score that margins are measured from; None where none is known (NaN: unknown)."""
    known = [score for score in scores if not np.isnan(score)]
    return {"lowest": min, "highest": max}[config.margin_positive](known, default=None)


class PositiveScores:
    """The miner's scores of positives: of those in the corpus by id, of the others by text."""

    def __init__(self, passages: Vectors, absent: list[str] | None, by_text: Path) -> None:
        self._passages = passages
        self._absent = Vectors(Path(absent[0]), Store.open(Path(absent[1]))) if absent else None
        with np.load(here(by_text)) as known:
            self._hashes, self._rows = known["hashes"], known["rows"]

    def of(self, queries: NDArray[np.float32], rows: Sequence[Row]) -> list[list[float]]:
        """Scores of each row's positives, in their order; NaN: unknown.

        Args:
            queries: vectors [N, D] of the rows' queries.
            rows: N rows.
        """
        both = zip(self._by_id(queries, rows), self._by_text(queries, rows), strict=True)
        return [np.where(np.isnan(by_id), by_text, by_id).tolist() for by_id, by_text in both]

    def of_all(self, queries: NDArray[np.float32], rows: Sequence[Row]) -> list[list[float]]:
        """Scores of all that is known by id or by text; for rows whose `pos` and `pos_ids` need not be of one order."""
        both = zip(self._by_id(queries, rows), self._by_text(queries, rows), strict=True)
        return [[*by_id, *by_text] for by_id, by_text in both]

    def _by_id(self, queries: NDArray[np.float32], rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        names = [row["pos_ids"] or () for row in rows]
        numbers = self._passages.store.find_ids([name for own in names for name in own])
        return _products(self._passages, numbers, list(map(len, names)), queries)

    def _by_text(self, queries: NDArray[np.float32], rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        texts, lengths = [text for row in rows for text in row["pos"]], [len(row["pos"]) for row in rows]
        wanted = hash_texts(texts)
        at = np.minimum(np.searchsorted(self._hashes, wanted), max(len(self._hashes) - 1, 0))
        numbers = np.full(len(texts), -1)
        if len(self._hashes):
            numbers = np.where(self._hashes[at] == wanted, self._rows[at], -1)
        inside = _products(self._passages, numbers, lengths, queries)
        if self._absent is None:
            return inside
        outside = _products(
            self._absent, self._absent.store.find_ids([passage_key(text) for text in texts]), lengths, queries
        )
        return [np.where(np.isnan(left), right, left) for left, right in zip(inside, outside, strict=True)]


def _products(
    vectors: Vectors, numbers: NDArray[np.int64], lengths: Sequence[int], queries: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Inner products of each query and its own passages by row number; NaN for -1."""
    products = np.full(len(numbers), np.nan, np.float32)
    there = numbers >= 0
    if there.any():
        of_query = np.repeat(np.arange(len(queries)), lengths)
        products[there] = np.einsum("pd,pd->p", vectors.take(numbers[there]), queries[of_query[there]])
    return np.split(products, np.cumsum(lengths)[:-1])


def passage_key(text: str) -> str:
    """Id of a positive that the corpus lacks."""
    return f"{hash_text(text):016x}"


def absent_positives(experiment: Experiment, rows: Store, corpus: Store) -> Store | None:
    """Each positive of the rows that the corpus lacks, by its id and by its text, once; None if it lacks none."""
    store = Store.open(_positives_folder(experiment, rows, corpus))
    return store if store.num_rows else None


def known_by_text(experiment: Experiment, rows: Store, corpus: Store) -> Path:
    """File of the positives that the corpus has under another id: sorted hashes of their texts, and its rows."""
    return _positives_folder(experiment, rows, corpus) / BY_TEXT


def _positives_folder(experiment: Experiment, rows: Store, corpus: Store) -> Path:
    """Where the positives are that are not in the corpus by id: 8 bytes of memory each."""
    key = [rows.fingerprint, corpus.fingerprint, VERSION]
    folder = Path(experiment.cache()) / f"absent-{fingerprint(key)}"
    if (folder / "store.json").exists():
        return folder
    lacking = [hash_texts(texts) for texts in _lacking_by_id(rows, corpus)]
    hashes, numbers = _found_by_text(corpus, np.unique(np.concatenate(lacking)))
    writer, seen = StoreWriter(folder, PASSAGES, experiment.passages_per_unit()), SeenHashes()
    for texts in _lacking_by_id(rows, corpus):
        own = hash_texts(texts)
        for text, left_out in zip(texts, seen.add(own) | np.isin(own, hashes), strict=True):
            if not left_out:
                writer.add({"id": passage_key(text), "text": text})
    np.savez(writer.working / BY_TEXT, hashes=hashes, rows=numbers)
    writer.finish()
    return folder


def _lacking_by_id(rows: Store, corpus: Store) -> Iterator[list[str]]:
    """Texts of the positives whose ids the corpus has not, of each part of the rows."""
    for part in rows.iter_parts(["pos", "pos_ids"]):
        table = part.to_pylist()
        missing = corpus.find_ids([name for row in table for name in row["pos_ids"]]) < 0
        texts = [text for row in table for text in row["pos"]]
        yield [text for text, lacks in zip(texts, missing, strict=True) if lacks]


def _found_by_text(corpus: Store, wanted: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Which of the sorted hashes are of texts of the corpus, and the first row of each."""
    hashes, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    if len(wanted):
        for part, table in zip(corpus.parts, corpus.iter_parts(["text"]), strict=True):
            own = hash_texts(table.column("text").to_pylist())
            here = np.flatnonzero(np.isin(own, wanted))
            hashes.append(own[here])
            numbers.append(here + part.first_row)
    found, first = np.unique(np.concatenate(hashes), return_index=True)
    return found, np.concatenate(numbers)[first]
