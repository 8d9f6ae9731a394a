"""Given embeddings in place of encoding: files in any order become the vectors of a store, part by part.

First every file is read once and left as runs, vectors sorted by the row that their id has in the store; then the parts
are gathered from the runs. A worker holds one run, or the parts of one unit: 256 MB at most, whatever the files' sizes.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.uris import public_name
from rayembed.data import mirror
from rayembed.data.embeddings import (
    NPY_IN_ORDER,
    EmbeddingFile,
    check_count,
    embedding_paths,
    ids_path,
    read_blocks,
    read_headers,
    read_rows,
)
from rayembed.data.row_ids import rows_of_ids, write_index
from rayembed.data.storage import fingerprint, identity, save_npy, stamp, whole_file, write_atomic
from rayembed.data.store import Int64s, Store
from rayembed.jobs.miner import miner
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors, rows_of_parts, save_part

VERSION = 1  # raise it when the same files give other vectors
ROWS_AT_ONCE = 65536
BYTES_AT_ONCE = 256 << 20
COPIED_ROWS = 4096  # rows that are copied at a time when a run is written
SHOWN = 5  # ids named in an error
RUNS, SUMMARY = "runs", "given.json"

logger = logging.getLogger(__name__)


def check_given(experiment: Experiment, rows: Store, corpus: Store) -> int:
    """Refuses mine.corpus_embeddings and mine.query_embeddings that cannot be used, by the files' headers alone.

    Returns:
        Dimension of the vectors, given or not.

    Raises:
        DataError: what is wrong with which file.
        ValueError: queries and passages have vectors of different dimensions.
    """
    config, found = experiment.mine, {}
    for side, store in (("corpus", corpus), ("query", rows)):
        paths = [] if config is None else getattr(config, f"{side}_embeddings")
        if paths:
            found[f"mine.{side}_embeddings"] = _headers(store, paths, f"mine.{side}_embeddings")[0].dimension
    if len(found) < 2:
        from rayembed.models.loading import load_config  # workers import this module too, and have no use for torch

        model = miner(experiment).model
        settings = load_config(model.name_or_path, trust_remote_code=model.trust_remote_code)
        found[f"{model.name_or_path}, which encodes what is not given,"] = int(settings.hidden_size)
    if len(set(found.values())) > 1:
        (first, one), (second, two) = found.items()
        raise ValueError(
            f"{first} has vectors of {one} dimensions, {second} of {two}; allowed: one model for both. Set both "
            "settings to embeddings of one model, or mine.model to the model that made them"
        )
    return next(iter(found.values()))


def reads_of_embeddings(paths: Sequence[str]) -> list[list[str]]:
    """What a job's record says of given embeddings: every file, ids included, with its size and time of change."""
    files = embedding_paths(paths, setting="embeddings")
    beside = [name for name in map(ids_path, files) if name is not None]
    return [[identity(file), stamp(file)] for file in [*files, *beside]]


def given_vectors(
    experiment: Experiment, store: Store, paths: Sequence[str], *, setting: str, id_of: str = "id"
) -> Vectors:
    """Vectors of a store from files of embeddings, gathered into the cache where it has them not.

    Args:
        experiment: resources, and whether the miner's vectors have length 1.
        store: of passages or queries, or of training rows, of which several may have one query id.
        paths: files, folders or globs, in a form that rayembed.data.embeddings reads.
        setting: where the paths are from, for messages.
        id_of: column of the store that holds the ids.

    Raises:
        DataError: a file cannot be used.
        ValueError: a row has no vector, or an id has two.
        UnitError: a file holds a vector that is not finite, or not as many ids as vectors.
    """
    normalize = miner(experiment).model.normalize_embeddings
    depends_on = {
        "version": VERSION,
        "files": reads_of_embeddings(paths),
        "texts": [store.fingerprint, store.layout, id_of],
        "normalize_embeddings": normalize,
    }
    folder = Path(experiment.cache()) / f"given-{fingerprint(depends_on)}"
    if not (folder / SUMMARY).exists():
        files = _headers(store, paths, setting, id_of)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "depends_on.json", json.dumps(depends_on, indent=1).encode())
        summary = _gather(experiment, store, files, folder, normalize, id_of)
        write_atomic(folder / SUMMARY, json.dumps(summary, indent=1).encode())
    mirror.remove(folder / RUNS)
    _judge(json.loads((folder / SUMMARY).read_text()), store, setting)
    return Vectors(folder, store)


def _headers(store: Store, paths: Sequence[str], setting: str, id_of: str | None = None) -> list[EmbeddingFile]:
    files = read_headers(paths, setting=setting)
    unique = (id_of or store.schema.names[0]) == "id"
    check_count(files, store.num_rows, setting=setting, ids_unique=unique)
    return files


def _gather(
    experiment: Experiment, store: Store, files: list[EmbeddingFile], folder: Path, normalize: bool, id_of: str
) -> dict[str, Any]:
    """Writes the parts whose rows all have one vector; counts what is wrong, and the vectors of no row."""
    limit = rows_at_once(files[0].dimension)
    shared = {"files": [asdict(file) for file in files], "store": str(store.folder), "normalize": normalize}
    totals: dict[str, Any] = {"vectors": sum(file.num_rows for file in files), "unknown": 0, "unknown_ids": []}
    units = _part_units(store, limit)
    if files[0].kind == NPY_IN_ORDER:
        work = Work(
            what="read embeddings",
            counted="vectors",
            worker="rayembed.jobs.embeddings:OrderedWorker",
            arguments=shared,
            folder=folder,
        )
        run_units(units, work, experiment.ray, use_gpu=False)
        return {**totals, "missing": 0, "repeated": 0}
    write_index(store, id_of, folder)
    work = Work(
        what="read embeddings",
        counted="vectors",
        worker="rayembed.jobs.embeddings:SortWorker",
        arguments={**shared, "id_of": id_of, "limit": limit},
        folder=folder / RUNS,
    )
    counts = run_units(_reading_units(files, limit), work, experiment.ray, use_gpu=False)
    totals["unknown"] = sum(count["unknown"] for count in counts)
    totals["unknown_ids"] = [name for count in counts for name in count["unknown_ids"]][:SHOWN]
    work = Work(
        what="put embeddings in order",
        counted="vectors",
        worker="rayembed.jobs.embeddings:GatherWorker",
        arguments={
            "store": str(store.folder),
            "id_of": id_of,
            "dimension": files[0].dimension,
            "runs": [run for count in counts for run in count["runs"]],
        },
        folder=folder,
    )
    counts = run_units(units, work, experiment.ray, use_gpu=False)
    for kind in ("missing", "repeated"):
        totals[kind] = sum(count[kind] for count in counts)
        totals[f"{kind}_ids"] = [name for count in counts for name in count[f"{kind}_ids"]][:SHOWN]
    return totals


def rows_at_once(dimension: int) -> int:
    """Vectors that a worker holds."""
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // (4 * dimension)))


def _judge(summary: dict[str, Any], store: Store, setting: str) -> None:
    """Refuses what is incomplete or ambiguous; what is more than was asked for is only told."""
    others = ", ".join(summary["unknown_ids"])
    if summary["missing"]:
        also = f"; it has {summary['unknown']:,} vectors of other ids, such as {others}" if others else ""
        raise ValueError(
            f"{setting}: {summary['missing']:,} of {store.num_rows:,} texts have no vector, those with the ids "
            f"{', '.join(summary['missing_ids'])} among them{also}. Add the files that hold them to {setting}, or "
            "remove it to encode the texts"
        )
    if summary["repeated"]:
        raise ValueError(
            f"{setting}: {summary['repeated']:,} of {store.num_rows:,} texts have more than one vector, those with the "
            f"ids {', '.join(summary['repeated_ids'])} among them; allowed: one an id. Take a file that repeats others "
            f"out of {setting}"
        )
    if summary["unknown"]:
        logger.warning(
            "%s: %d of %d vectors are left out, their ids are those of no text (%s)",
            setting,
            summary["unknown"],
            summary["vectors"],
            others,
        )


def _part_units(store: Store, limit: int) -> list[Unit]:
    """Parts that are gathered at once, at least one."""
    bounds, rows = [0], 0
    for index, part in enumerate(store.parts):
        if rows and rows + part.num_rows > limit:
            bounds.append(index)
            rows = 0
        rows += part.num_rows
    units = []
    for first, last in pairwise([*bounds, len(store.parts)]):
        size = sum(store.layout[first:last])
        spec = {"first": first, "last": last}
        units.append(Unit(f"parts-{first:05d}", size, spec, rows_of_parts(store, first, last)))
    return units


def _reading_units(files: Sequence[EmbeddingFile], limit: int) -> list[Unit]:
    """Row groups of one or more files that are read in a row: [file, first group, last group] each."""
    grouped: list[list[tuple[int, int, int]]] = [[]]  # of each unit: file, group, rows
    rows = 0
    for index, file in enumerate(files):
        for group, size in enumerate(file.groups):
            if grouped[-1] and rows + size > limit:
                grouped.append([])
                rows = 0
            grouped[-1].append((index, group, size))
            rows += size
    return [_reading_unit(files, number, groups) for number, groups in enumerate(grouped)]


def _reading_unit(files: Sequence[EmbeddingFile], number: int, groups: Sequence[tuple[int, int, int]]) -> Unit:
    pieces = []
    for index, own in groupby(groups, key=itemgetter(0)):
        numbers = [group for _, group, _ in own]
        pieces.append([index, numbers[0], numbers[-1] + 1])
    (first, group, _), (last, _, _) = groups[0], groups[-1]
    where = f"from row {sum(files[first].groups[:group])} of {public_name(files[first].path)} on"
    if last != first:
        where += f", to {public_name(files[last].path)}"
    return Unit(f"run-{number:05d}", sum(rows for _, _, rows in groups), {"pieces": pieces}, where)


class SortWorker:
    """Reads row groups and leaves them as runs: NAME.rows.npy, ascending, and NAME.vectors.npy."""

    def __init__(
        self,
        *,
        files: list[dict[str, Any]],
        store: str,
        normalize: bool,
        id_of: str,
        limit: int,
        threads: int,
        use_gpu: bool,
    ) -> None:
        self._files = [EmbeddingFile(**file) for file in files]
        self._store, self._id_of = Store.open(Path(store)), id_of
        self._normalize, self._limit = normalize, limit

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the runs of one unit, more than one where a row group is larger than a run."""
        counts: dict[str, Any] = {"unknown": 0, "unknown_ids": [], "runs": []}
        held = np.empty((self._limit, self._files[0].dimension), np.float32)
        ids: list[str] = []

        def leave() -> None:
            at, rows = rows_of_ids(self._store, self._id_of, folder.parent, ids)
            unknown = np.setdiff1d(np.arange(len(ids)), at)
            counts["unknown"] += len(unknown)
            counts["unknown_ids"] = [*counts["unknown_ids"], *(ids[i] for i in unknown[:SHOWN])][:SHOWN]
            if len(rows):
                run = f"{name}-{len(counts['runs']):03d}"
                order = np.argsort(rows, kind="stable")
                save_npy(folder / f"{run}.rows.npy", rows[order])
                with whole_file(folder / f"{run}.vectors.npy") as working:
                    _save_rows(working, held, at[order])
                counts["runs"].append([run, int(rows.min()), int(rows.max())])
            ids.clear()

        for index, first, last in spec["pieces"]:
            for block in read_blocks(self._files[index], first, last, normalize=self._normalize):
                taken = 0
                while taken < len(block.ids):
                    count = min(self._limit - len(ids), len(block.ids) - taken)
                    held[len(ids) : len(ids) + count] = block.vectors[taken : taken + count]
                    ids.extend(block.ids[taken : taken + count])
                    taken += count
                    if len(ids) == self._limit:
                        leave()
        leave()
        return counts


def _save_rows(path: Path, vectors: NDArray[np.float32], at: Int64s) -> None:
    """Writes vectors[at] as npy without another copy of them all."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(at), vectors.shape[1])}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(at), COPIED_ROWS):
            file.write(vectors[at[start : start + COPIED_ROWS]].astype("<f4", copy=False).tobytes())


class GatherWorker:
    """Gathers parts of the store from the runs."""

    def __init__(
        self, *, store: str, id_of: str, dimension: int, runs: list[tuple[str, int, int]], threads: int, use_gpu: bool
    ) -> None:
        self._store, self._id_of = Store.open(Path(store)), id_of
        self._dimension, self._runs = dimension, runs

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the parts, if each of their rows has one vector."""
        parts = self._store.parts[spec["first"] : spec["last"]]
        start, stop = parts[0].first_row, parts[-1].first_row + parts[-1].num_rows
        vectors = np.empty((stop - start, self._dimension), np.float32)
        times = np.zeros(stop - start, np.int64)
        for run, lowest, highest in self._runs:
            if highest < start or lowest >= stop:
                continue
            rows = np.load(mirror.here(folder / RUNS / f"{run}.rows.npy"), mmap_mode="r")
            low, high = np.searchsorted(rows, [start, stop])
            here = rows[low:high] - start
            vectors[here] = np.load(mirror.here(folder / RUNS / f"{run}.vectors.npy"), mmap_mode="r")[low:high]
            np.add.at(times, here, 1)
        counts: dict[str, Any] = {}
        for kind, wrong in (("missing", times == 0), ("repeated", times > 1)):
            rows = start + np.flatnonzero(wrong)
            counts[kind] = len(rows)
            counts[f"{kind}_ids"] = self._store.take(rows[:SHOWN], [self._id_of]).column(self._id_of).to_pylist()
        if not counts["missing"] and not counts["repeated"]:
            for index, part in enumerate(parts, spec["first"]):
                save_part(folder, index, vectors[part.first_row - start :][: part.num_rows])
        return counts


class OrderedWorker:
    """Cuts files whose rows are those of the store into its parts."""

    def __init__(
        self, *, files: list[dict[str, Any]], store: str, normalize: bool, threads: int, use_gpu: bool
    ) -> None:
        self._files = [EmbeddingFile(**file) for file in files]
        self._store, self._normalize = Store.open(Path(store)), normalize

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the parts."""
        for index in range(spec["first"], spec["last"]):
            save_part(folder, index, self._read(self._store.parts[index].first_row, self._store.parts[index].num_rows))
        return {}

    def _read(self, first: int, count: int) -> NDArray[np.float32]:
        """Vectors [count, D] from row `first` on, over all files."""
        vectors = np.empty((count, self._files[0].dimension), np.float32)
        before = 0  # rows of the files so far
        for file in self._files:
            low, high = max(first - before, 0), min(first + count - before, file.num_rows)
            if low < high:
                for row, block in read_rows(file, low, high, normalize=self._normalize):
                    vectors[before + row - first :][: len(block)] = block
            before += file.num_rows
        return vectors
