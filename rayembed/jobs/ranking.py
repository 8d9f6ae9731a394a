"""The best passages of a corpus for every query: a search a shard, then a merge a block of queries.

What shards found lies on disk, [Q, k'] a shard; a merge maps it, reads its own queries' rows, and holds a few shards at
a time, so its memory does not grow with the corpus.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.data.storage import fingerprint
from rayembed.data.store import Store
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vectors import Vectors
from rayembed.search.exact import top_k
from rayembed.search.merge import Top, fold_top_k

FORMAT = "npy"  # in the cache's key, so that what an older version left in another one is not taken for done


def search_shards(
    experiment: Experiment, queries: Vectors, passages: Vectors, k: int, *, use_gpu: bool = False
) -> Path:
    """The k best of every part of the corpus for every query.

    Each part gives top-<part>.scores.npy [Q, k'] float32 and top-<part>.rows.npy [Q, k'] int64.

    Returns:
        The folder, in the cache.
    """
    folder = passages.folder.parent / f"top-{fingerprint([queries.folder.name, passages.folder.name, k, FORMAT])}"
    units = [Unit(shard_name(i), part.num_rows, {"part": i}) for i, part in enumerate(passages.store.parts)]
    work = Work(
        what="search",
        counted="passages",
        worker="rayembed.jobs.ranking:SearchWorker",
        arguments={
            "queries": [str(queries.folder), str(queries.store.folder)],
            "passages": [str(passages.folder), str(passages.store.folder)],
            "k": k,
        },
        folder=folder,
    )
    run_units(units, work, experiment.ray, use_gpu=use_gpu)
    return folder


def shard_name(part: int) -> str:
    """Name of a shard's search."""
    return f"top-{part:05d}"


class SearchWorker:
    """Searches parts of the corpus; holds all query vectors, so its memory grows with the queries, not the corpus."""

    def __init__(self, *, queries: list[str], passages: list[str], k: int, threads: int, use_gpu: bool) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._queries = Vectors(Path(queries[0]), Store.open(Path(queries[1]))).all()
        self._passages = Vectors(Path(passages[0]), Store.open(Path(passages[1])))
        self._k, self._use_gpu = k, use_gpu

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one shard's best."""
        index = spec["part"]
        part = self._passages.store.parts[index]
        ids = np.array(self._passages.store.read_part(index, ["id"]).column("id").to_pylist())
        ranks = np.empty(len(ids), np.int64)
        ranks[np.argsort(ids)] = np.arange(len(ids))
        scores, rows = top_k(self._queries, self._passages.part(index), ranks, self._k, use_gpu=self._use_gpu)
        save_top(folder, name, scores, rows + part.first_row)
        return {"passages": part.num_rows}


def save_top(folder: Path, name: str, scores: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Writes what one shard found, each file whole or not at all."""
    for kind, values in (("scores", scores), ("rows", rows)):
        partial = folder / f"{name}.{kind}.partial.npy"
        np.save(partial, values)
        partial.replace(folder / f"{name}.{kind}.npy")


class ShardTops:
    """What the shards found, read by blocks of queries."""

    def __init__(self, folder: Path, corpus: Store) -> None:
        self._corpus = corpus
        self._folder = folder
        self._names = [shard_name(i) for i in range(len(corpus.parts))]

    def merged(self, first: int, last: int, k: int) -> list[Top]:
        """Scores and corpus rows of the k best for queries `first` to `last` - 1."""
        scores, rows = fold_top_k(self._tops(first, last), k, self._ids_of)
        return list(zip(scores, rows, strict=True))

    def _tops(self, first: int, last: int) -> Iterator[Top]:
        for name in self._names:
            scores, rows = (
                np.array(np.load(self._folder / f"{name}.{kind}.npy", mmap_mode="r")[first:last])  # lets go of the map
                for kind in ("scores", "rows")
            )
            yield scores, rows

    def _ids_of(self, rows: NDArray[np.int64]) -> NDArray[np.str_]:
        unique, inverse = np.unique(rows, return_inverse=True)
        return np.array(self._corpus.take(unique, ["id"]).column("id").to_pylist())[inverse]
