"""The best passages of a corpus for every query: units of a shard and a block of queries, then a merge by queries.

A worker goes through its shard piece by piece and holds the vectors of one piece and of its queries, and their best so
far. What it found lies on disk, [queries of the block, k'] a unit; a merge maps it, reads its own queries' rows, and
holds a few shards at a time. So no process holds all vectors of anything. Units are ordered by shard, so that a
shard's vectors are still in the page cache when the next block of queries comes.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.search import SearchConfig
from rayembed.data import mirror
from rayembed.data.storage import fingerprint, save_npy, whole_file, write_atomic
from rayembed.data.store import Store
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors
from rayembed.search.backends import (
    BACKENDS,
    build_index,
    device_name,
    is_exact,
    load_index,
    open_index,
    resolve_backend,
)
from rayembed.search.exact import QUERIES_PER_SEARCH, top_k
from rayembed.search.merge import IdsOf, Top, fold_top_k, merge_top_k

FORMAT = "blocks"  # in the cache's key, so that what an older version left in another one is not taken for done
RECORD = "search.json"
Range = tuple[int, int]


def search_shards(
    experiment: Experiment,
    queries: Vectors,
    passages: Vectors,
    k: int,
    *,
    use_gpu: bool = False,
    exact: bool = False,
    sample: Sequence[int] | None = None,
) -> Path:
    """The k best of every shard of the corpus for every query.

    Each unit gives NAME.scores.npy [queries of the block, k'] float32 and NAME.rows.npy int64, the name of `unit_name`;
    search.json says how they are cut and by what they were found. An exact search has one result, so a finished one is
    taken whatever found it and however it was cut.

    Args:
        experiment: section search, resources, cache.
        queries: vectors of the queries.
        passages: vectors of the corpus.
        k: passages a query.
        use_gpu: search on a GPU of each worker; ivf and hnsw run on the CPU.
        exact: search exactly whatever search.backend says.
        sample: rows of the queries that are searched, which are counted from 0 in the result. None: all.

    Returns:
        The folder, in the cache.
    """
    config, exactly = experiment.search, exact or is_exact(experiment.search)
    depends_on = [queries.folder.name, passages.folder.name, k, FORMAT, None if sample is None else list(sample)]
    indexes = None if exactly else _build_indexes(experiment, passages)
    if indexes is not None:
        searched = [getattr(config, name) for name in BACKENDS[config.backend].searched_with]
        depends_on += [indexes.name, searched]
    folder = passages.folder.parent / f"top-{fingerprint(depends_on)}"
    if (folder / RECORD).exists():
        return folder
    cut = {
        "passages": passages.store.num_rows,
        "queries": queries.store.num_rows if sample is None else len(sample),
        "passages_per_unit": _unit_size(config, exact=exactly),
        "queries_per_unit": config.queries_per_unit,
    }
    arguments = {
        "experiment": shipped(experiment),
        "queries": _located(queries),
        "passages": _located(passages),
        "k": k,
        "exact": exactly,
        "indexes": None if indexes is None else str(indexes),
        "sample": None if sample is None else list(sample),
    }
    worker = "rayembed.jobs.ranking:SearchWorker"
    work = Work(what="search", counted="scores", worker=worker, arguments=arguments, folder=folder)
    done = run_units(_units(cut), work, experiment.ray, use_gpu=use_gpu and exactly)
    _write_record(folder, done, {"exact": exactly, "k": k, **cut, "passages_per_index": config.passages_per_index})
    return folder


def _write_record(folder: Path, done: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Written last: a folder that has it is finished."""
    found_by = {name: ", ".join(sorted({count[name] for count in done})) for name in ("backend", "device")}
    write_atomic(folder / RECORD, json.dumps({**found_by, **settings}, indent=1).encode())


def ranges(first: int, last: int, size: int) -> list[Range]:
    """`first` to `last` - 1 cut at multiples of `size`."""
    cuts = [first, *range((first // size + 1) * size, last, size), last]
    return list(pairwise(cuts)) if first < last else []


def unit_name(passages: Range, queries: Range) -> str:
    """Name of the search of a shard by a block of queries: first and last row of both, the last not included."""
    return f"top-{passages[0]:09d}-{passages[1]:09d}-for-{queries[0]:09d}-{queries[1]:09d}"


def _units(cut: dict[str, int]) -> list[Unit]:
    blocks = ranges(0, cut["queries"], cut["queries_per_unit"])
    return [
        Unit(unit_name(shard, block), (shard[1] - shard[0]) * (block[1] - block[0]), {"shard": shard, "block": block})
        for shard in ranges(0, cut["passages"], cut["passages_per_unit"])
        for block in blocks
    ]


def _unit_size(config: SearchConfig, *, exact: bool) -> int:
    """Passages of a unit: whole pieces where an index is approximate, whose result depends on what it is built of."""
    if exact:
        return config.passages_per_unit
    return -(-config.passages_per_unit // config.passages_per_index) * config.passages_per_index


def _build_indexes(experiment: Experiment, passages: Vectors) -> Path:
    """Builds the approximate index of every piece that has none yet; they serve any queries."""
    import faiss

    config = experiment.search
    depends_on = {
        "passages": passages.folder.name,
        "backend": [config.backend, faiss.__version__],
        "settings": [getattr(config, name) for name in BACKENDS[config.backend].built_with],
        "passages_per_index": config.passages_per_index,
        "seed": experiment.seed,
    }
    folder = passages.folder.parent / f"index-{fingerprint(depends_on)}"
    pieces = ranges(0, passages.store.num_rows, config.passages_per_index)
    work = Work(
        what=f"build {config.backend} indexes",
        counted="passages",
        worker="rayembed.jobs.ranking:IndexWorker",
        arguments={
            "experiment": shipped(experiment),
            "passages": _located(passages),
        },
        folder=folder,
        light=True,
    )
    units = [Unit(_index_name(piece), piece[1] - piece[0], {"piece": piece}) for piece in pieces]
    run_units(units, work, experiment.ray, use_gpu=False)
    return folder


def _index_name(piece: Range) -> str:
    return f"index-{piece[0]:09d}-{piece[1]:09d}"


class IndexWorker:
    """Builds the approximate index of a piece of the corpus."""

    def __init__(self, *, experiment: str, passages: list[str], threads: int, use_gpu: bool) -> None:
        self._experiment = received(experiment)
        self._passages = _opened(passages)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one index."""
        vectors, search = self._passages.rows(*spec["piece"]), self._experiment.search
        with whole_file(folder / f"{name}.faiss") as working:
            build_index(search.backend, vectors, search, self._experiment.seed, working)
        return {"passages": len(vectors)}


class SearchWorker:
    """Searches shards of the corpus for blocks of queries, a piece of the shard in memory at a time."""

    def __init__(
        self,
        *,
        experiment: str,
        queries: list[str],
        passages: list[str],
        k: int,
        exact: bool,
        indexes: str | None,
        sample: list[int] | None,
        threads: int,
        use_gpu: bool,
    ) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._config, self._k = received(experiment).search, k
        self._backend = resolve_backend(self._config, use_gpu=use_gpu, exact=exact, k=k)
        if self._backend.startswith("torch"):
            import torch

            torch.set_num_threads(threads)
        self._queries, self._passages = _opened(queries), _opened(passages)
        self._indexes = None if indexes is None else Path(indexes)
        self._sample = None if sample is None else np.array(sample, np.int64)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one shard's best for one block."""
        (start, end), (first, last) = spec["shard"], spec["block"]
        if self._sample is None:
            queries = self._queries.rows(first, last)
        else:
            queries = self._queries.take(self._sample[first:last])
        best: Top | None = None
        for piece in ranges(start, end, self._config.passages_per_index):
            found = self._of_piece(queries, piece)
            best = found if best is None else _better(best, found, self._k, ids_in(self._passages.store))
        assert best is not None, "no passage in the shard"
        save_top(folder, name, *best)
        return {"backend": self._backend, "device": device_name(self._backend)}

    def _of_piece(self, queries: NDArray[np.float32], piece: Range) -> Top:
        vectors = self._passages.rows(*piece)
        if self._indexes is None:
            index = open_index(self._backend, vectors)
        else:
            file = mirror.here(self._indexes / f"{_index_name(piece)}.faiss")
            index = load_index(self._backend, file, self._config)
        scores, rows = top_k(queries, vectors, _places_of_ids(self._passages.store, piece), self._k, index=index)
        return scores, rows + piece[0]


def _located(vectors: Vectors) -> list[str]:
    return [str(vectors.folder), str(vectors.store.folder)]


def _opened(folders: list[str]) -> Vectors:
    return Vectors(Path(folders[0]), Store.open(Path(folders[1])))


def _better(best: Top, found: Top, k: int, ids_of: IdsOf) -> Top:
    """The k best of both, some queries at a time: a merge takes several times the memory of what it merges."""
    merged = []
    for first, last in ranges(0, len(best[0]), QUERIES_PER_SEARCH):
        tops = [(scores[first:last], rows[first:last]) for scores, rows in (best, found)]
        merged.append(merge_top_k([scores for scores, _ in tops], [rows for _, rows in tops], k, ids_of))
    return np.concatenate([scores for scores, _ in merged]), np.concatenate([rows for _, rows in merged])


def ids_in(corpus: Store) -> IdsOf:
    """Looks ids of passages up by row number."""

    def ids_of(rows: NDArray[np.int64]) -> NDArray[np.object_]:
        unique, inverse = np.unique(rows, return_inverse=True)
        return _ids(corpus, unique)[inverse]

    return ids_of


def _places_of_ids(corpus: Store, piece: Range) -> IdsOf:
    """Gives a piece's rows the places of their ids; sorted once, when scores first tie."""

    @cache
    def places() -> NDArray[np.int64]:
        ids = _ids(corpus, np.arange(*piece))
        sorted_places = np.empty(len(ids), np.int64)
        sorted_places[np.argsort(ids)] = np.arange(len(ids))
        return sorted_places

    return lambda rows: places()[rows]


def _ids(corpus: Store, rows: NDArray[np.int64]) -> NDArray[np.object_]:
    """Ids by row, as objects: in an array of texts each would take four bytes for every character of the longest."""
    return np.array(corpus.take(rows, ["id"]).column("id").to_pylist(), np.object_)


def save_top(folder: Path, name: str, scores: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Writes what a unit found, each file whole or not at all."""
    for kind, values in (("scores", scores), ("rows", rows)):
        save_npy(folder / f"{name}.{kind}.npy", values)


class ShardTops:
    """What a finished search found, read by queries."""

    def __init__(self, folder: Path, corpus: Store) -> None:
        self._folder, self._ids_of = folder, ids_in(corpus)
        cut = json.loads(mirror.here(folder / RECORD).read_text())
        self._shards = ranges(0, cut["passages"], cut["passages_per_unit"])
        self._blocks = ranges(0, cut["queries"], cut["queries_per_unit"])

    def merged(self, first: int, last: int, k: int) -> list[Top]:
        """Scores and corpus rows of the k best for queries `first` to `last` - 1, whichever blocks they are in."""
        tops: list[Top] = []
        for block in self._blocks:
            if block[0] < last and first < block[1]:
                of_block = self._tops(block, max(first, block[0]) - block[0], min(last, block[1]) - block[0])
                tops += zip(*fold_top_k(of_block, k, self._ids_of), strict=True)
        return tops

    def _tops(self, block: Range, first: int, last: int) -> Iterator[Top]:
        files = [
            [self._folder / f"{unit_name(shard, block)}.{kind}.npy" for kind in ("scores", "rows")]
            for shard in self._shards
        ]
        mirror.all_here(file for both in files for file in both)
        for both in files:
            scores, rows = (np.array(np.load(file, mmap_mode="r")[first:last]) for file in both)  # lets go of the maps
            yield scores, rows
