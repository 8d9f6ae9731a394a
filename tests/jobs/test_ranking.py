"""Searches cut into units in many ways: one result, done once, in bounded memory; Ray's place is taken by a loop."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.ray import RayConfig
from rayembed.config.search import SearchConfig
from rayembed.data.store import PASSAGES, QUERIES, StoreWriter
from rayembed.jobs import ranking
from rayembed.jobs.ranking import RECORD, IndexWorker, SearchWorker, ShardTops, ranges, search_shards
from rayembed.jobs.recall import measure_recall
from rayembed.jobs.units import Unit, Work
from rayembed.jobs.vector_files import Vectors
from tests.jobs.units_here import actor_for, done_by

Floats = NDArray[np.float32]
NUM_PASSAGES, NUM_QUERIES, K = 230, 37, 12
CUTS = [
    {},
    {"passages_per_index": 64, "passages_per_unit": 100, "queries_per_unit": 10},
    {"passages_per_index": 5, "passages_per_unit": 17, "queries_per_unit": 36},
    {"passages_per_index": 1000, "passages_per_unit": 90, "queries_per_unit": 5},
    {"passages_per_index": 229, "passages_per_unit": 1000, "queries_per_unit": 37},
]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units are done here one after the other, as an actor does them; gives the list of their names."""
    names: list[str] = []

    def stream(pending: Sequence[Unit], work: Work, config: RayConfig, use_gpu: bool) -> Iterator[dict[str, str]]:
        actor = actor_for(work)
        for unit in pending:
            names.append(unit.name)
            yield done_by(actor, unit, work)

    monkeypatch.setattr("rayembed.jobs.units._stream", stream)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return names


def with_copies(rng: np.random.Generator, rows: int, dimension: int = 24) -> Floats:
    """Vectors that point everywhere, so that scores are negative too; each about three times."""
    different = rng.standard_normal((rows // 3 + 1, dimension)).astype(np.float32)
    return different[rng.integers(len(different), size=rows)]


def stored(folder: Path, name: str, vectors: Floats, ids: Sequence[str], rows_per_part: int) -> Vectors:
    """Vectors as `encode_stores` leaves them, their store beside."""
    writer = StoreWriter(folder / f"{name}-store", QUERIES if name == "queries" else PASSAGES, rows_per_part)
    for own in ids:
        writer.add({"id": own, "text": own})
    store = writer.finish()
    (folder / name).mkdir()
    for i, part in enumerate(store.parts):
        np.save(folder / name / f"part-{i:05d}.npy", vectors[part.first_row : part.first_row + part.num_rows])
    return Vectors(folder / name, store)


def experiment(folder: Path, **search: Any) -> Experiment:  # noqa: ANN401 - settings
    return Experiment(
        output_dir=str(folder),
        model={"name_or_path": "none"},  # type: ignore[arg-type] # pydantic reads the dict
        search=SearchConfig(**search),
    )


def corpus(folder: Path) -> tuple[Vectors, Vectors]:
    rng = np.random.default_rng(3)
    ids = [f"p{i}" for i in rng.permutation(NUM_PASSAGES)]
    folder.mkdir(exist_ok=True)
    passages = stored(folder, "passages", with_copies(rng, NUM_PASSAGES), ids, 50)
    queries = stored(folder, "queries", with_copies(rng, NUM_QUERIES), [f"q{i}" for i in range(NUM_QUERIES)], 20)
    return queries, passages


def by_faiss(queries: Vectors, passages: Vectors, k: int) -> list[list[int]]:
    """One IndexFlatIP over everything, score-ordered; scores that are equal but for rounding go by id."""
    vectors = passages.all()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, rows = index.search(queries.all(), len(vectors))
    ids = [row["id"] for table in passages.store.iter_parts(["id"]) for row in table.to_pylist()]
    return [
        [row for _, _, row in sorted((-round(float(s), 5), ids[r], r) for s, r in zip(*own, strict=True))][:k]
        for own in zip(scores, rows.tolist(), strict=True)
    ]


def found(folder: Path, passages: Vectors, k: int = K) -> list[tuple[list[float], list[int]]]:
    tops = ShardTops(folder, passages.store).merged(0, NUM_QUERIES, k)
    return [(scores.tolist(), rows.tolist()) for scores, rows in tops]


def record(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return value


@pytest.mark.parametrize(
    ("first", "last", "size", "expected"),
    [
        (0, 10, 4, [(0, 4), (4, 8), (8, 10)]),
        (3, 9, 4, [(3, 4), (4, 8), (8, 9)]),
        (4, 8, 4, [(4, 8)]),
        (5, 6, 100, [(5, 6)]),
        (0, 0, 3, []),
    ],
)
def test_ranges_are_cut_at_multiples(first: int, last: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert ranges(first, last, size) == expected


def test_one_long_id_does_not_make_all_of_them_long(tmp_path: Path) -> None:
    """As an array of texts, 2000 ids beside one of 4000 characters are 32 MB."""
    ids = ["é" * 4000, *(f"d{i}" for i in range(2000)), "e", "😀", "z", "\ufb01"]
    passages = stored(tmp_path, "passages", np.zeros((len(ids), 1), np.float32), ids, 512)
    rows = np.random.default_rng(0).permutation(len(ids))
    expected = sorted(ids)
    tracemalloc.start()
    by_id = rows[np.argsort(ranking.ids_in(passages.store)(rows))]
    places = ranking._places_of_ids(passages.store, (5, len(ids)))(np.arange(len(ids) - 5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [ids[row] for row in by_id] == expected
    assert places.tolist() == [sorted(ids[5:]).index(name) for name in ids[5:]]
    assert peak < 8 << 20


@pytest.mark.parametrize("backend", ["flat", "torch"])
def test_exact_searches_equal_one_faiss_index_however_they_are_cut(
    backend: str, tmp_path: Path, in_this_process: list[str]
) -> None:
    results = []
    for number, cut in enumerate(CUTS):
        queries, passages = corpus(tmp_path / str(number))
        folder = search_shards(experiment(tmp_path, backend=backend, **cut), queries, passages, K)
        results.append(found(folder, passages))
        assert (record(folder)["backend"], record(folder)["exact"]) == (backend, True)
        assert not list(folder.rglob("*partial*"))
    assert [rows for _, rows in results[0]] == by_faiss(queries, passages, K)
    assert all(result == results[0] for result in results[1:]), "to the last bit"


def test_more_ranks_than_passages_give_all_with_negative_scores(tmp_path: Path, in_this_process: list[str]) -> None:
    queries, passages = corpus(tmp_path)
    folder = search_shards(experiment(tmp_path, **CUTS[2]), queries, passages, 1000)
    tops = found(folder, passages, 1000)
    assert [rows for _, rows in tops] == by_faiss(queries, passages, 1000)
    assert all(scores[-1] < 0 for scores, _ in tops)


def test_any_range_of_queries_is_read_over_the_borders_of_blocks(tmp_path: Path, in_this_process: list[str]) -> None:
    queries, passages = corpus(tmp_path)
    tops = ShardTops(search_shards(experiment(tmp_path, **CUTS[1]), queries, passages, K), passages.store)
    expected = [rows[:5] for rows in by_faiss(queries, passages, K)]
    for first in range(0, NUM_QUERIES, 3):
        for last in range(first, NUM_QUERIES + 1, 4):
            assert [rows.tolist() for _, rows in tops.merged(first, last, 5)] == expected[first:last]


def test_a_finished_exact_search_serves_any_exact_backend_and_any_cut(
    tmp_path: Path, in_this_process: list[str]
) -> None:
    queries, passages = corpus(tmp_path)
    folder = search_shards(experiment(tmp_path, backend="flat", **CUTS[1]), queries, passages, K)
    assert len(in_this_process) == 3 * 4, "shards times blocks"
    assert in_this_process == sorted(in_this_process), "by shard"
    again = search_shards(experiment(tmp_path, backend="torch", **CUTS[2]), queries, passages, K)
    evaluation = search_shards(experiment(tmp_path, backend="ivf"), queries, passages, K, exact=True)
    assert again == evaluation == folder
    assert len(in_this_process) == 12
    assert search_shards(experiment(tmp_path), queries, passages, K + 1) != folder
    assert record(folder)["queries_per_unit"] == 10, "as it was cut"


@pytest.mark.parametrize("backend", ["flat", "hnsw"])
def test_a_killed_search_goes_on_with_what_is_left(
    backend: str, tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = SearchWorker.__call__, list[str]()

    def dying(self: SearchWorker, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        calls.append(name)
        if len(calls) == 5:
            raise OSError("killed")
        return own(self, spec, name, folder)

    monkeypatch.setattr(SearchWorker, "__call__", dying)
    queries, passages = corpus(tmp_path)
    asked = experiment(tmp_path, backend=backend, **CUTS[1])
    with pytest.raises(RuntimeError, match="killed"):
        search_shards(asked, queries, passages, K)
    first = set(calls[:4] + calls[5:])
    calls[:] = ["", "", "", "", ""]
    in_this_process.clear()
    folder = search_shards(asked, queries, passages, K)
    assert len(calls) == 6
    assert in_this_process == calls[5:], "no index is built again either"
    assert not set(calls) & first
    other, whole = corpus(tmp_path / "unbroken")
    assert found(folder, passages) == found(search_shards(asked, other, whole, K), whole)


@pytest.mark.parametrize("backend", ["ivf", "hnsw"])
def test_approximate_searches_do_not_depend_on_units_and_build_each_index_once(
    backend: str, tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, own = list[str](), IndexWorker.__call__

    def counted(self: IndexWorker, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        built.append(name)
        return own(self, spec, name, folder)

    monkeypatch.setattr(IndexWorker, "__call__", counted)
    results = []
    for number, units in enumerate([(1000, 1000), (10, 7), (130, 36)]):
        queries, passages = corpus(tmp_path / str(number))
        cut = {"passages_per_index": 100, "passages_per_unit": units[0], "queries_per_unit": units[1]}
        asked = experiment(tmp_path, backend=backend, ivf_probes=1, hnsw_ef_search=K, hnsw_neighbors=2, **cut)
        results.append(found(search_shards(asked, queries, passages, K), passages))
        assert len(built) == 3 * (number + 1)
    assert results[0] == results[1] == results[2]
    search_shards(asked, queries, passages, K + 1)
    assert len(built) == 9, "an index serves other searches"
    indexes = [path.name for path in tmp_path.glob("2/index-*/*") if path.name != "done"]
    assert sorted(indexes) == sorted(f"{name}.faiss" for name in set(built))


@pytest.mark.parametrize("backend", ["ivf", "hnsw"])
def test_what_an_approximate_search_depends_on_names_its_folder(
    backend: str, tmp_path: Path, in_this_process: list[str]
) -> None:
    queries, passages = corpus(tmp_path)
    base = experiment(tmp_path, backend=backend, passages_per_index=100)
    own: list[dict[str, Any]] = {
        "ivf": [{"ivf_lists": 2}, {"ivf_probes": 2}],
        "hnsw": [{"hnsw_neighbors": 5}, {"hnsw_ef_construction": 9}, {"hnsw_ef_search": 30}],
    }[backend]
    own.append({"passages_per_index": 99})
    others = [replace(base, search=replace(base.search, **change)) for change in own]
    others += [replace(base, seed=1), replace(base, search=SearchConfig())]
    folders = [search_shards(asked, queries, passages, K) for asked in (base, *others)]
    assert len(set(folders)) == len(folders)
    same = replace(base, search=replace(base.search, queries_per_unit=5, passages_per_unit=100))
    assert search_shards(same, queries, passages, K) == folders[0]
    kept = record(folders[0])
    assert (kept["backend"], kept["exact"]) == (backend, False)
    assert faiss.__version__ in kept["device"]


@pytest.mark.parametrize("backend", ["ivf", "hnsw"])
def test_recall_is_measured_on_a_sample(backend: str, tmp_path: Path, in_this_process: list[str]) -> None:
    queries, passages = corpus(tmp_path)
    low = {"ivf": {"ivf_probes": 1}, "hnsw": {"hnsw_neighbors": 2, "hnsw_ef_search": 1}}[backend]
    for settings, number in ((low, NUM_QUERIES), (low, 9), ({"ivf_probes": 60, "hnsw_ef_search": 200}, 100)):
        asked = experiment(tmp_path, backend=backend, recall_queries=number, **settings)
        folder = search_shards(asked, queries, passages, K)
        measured = measure_recall(asked, queries, passages, folder, K)
        assert measured.keys() == {"backend", "recall_at", "recall", "queries"}
        assert (measured["backend"], measured["recall_at"]) == (backend, K)
        assert measured["queries"] == min(number, NUM_QUERIES)
        if number == NUM_QUERIES:
            scores = np.stack([own for own, _ in found(folder, passages)])
            exact = search_shards(asked, queries, passages, K, exact=True)
            least = np.stack([own for own, _ in found(exact, passages)])[:, -1:]
            assert measured["recall"] == pytest.approx(np.mean(scores >= least))
            assert 0.2 < measured["recall"] < 1
        elif number == 100:
            assert measured["recall"] == 1
        assert measured == measure_recall(asked, queries, passages, folder, K), "the same sample"


def test_recall_of_an_exact_search_needs_no_search(tmp_path: Path, in_this_process: list[str]) -> None:
    queries, passages = corpus(tmp_path)
    asked = experiment(tmp_path)
    folder = search_shards(asked, queries, passages, K)
    in_this_process.clear()
    assert measure_recall(asked, queries, passages, folder, K) == {"backend": "flat", "exact": True}
    assert not in_this_process


def test_a_sample_is_searched_in_its_order(tmp_path: Path, in_this_process: list[str]) -> None:
    queries, passages = corpus(tmp_path)
    folder = search_shards(experiment(tmp_path, queries_per_unit=2), queries, passages, K, sample=[30, 4, 19])
    tops = ShardTops(folder, passages.store).merged(0, 3, K)
    expected = by_faiss(queries, passages, K)
    assert [rows.tolist() for _, rows in tops] == [expected[30], expected[4], expected[19]]
    assert record(folder)["queries"] == 3


def test_a_worker_reads_one_piece_at_a_time(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, int]] = []
    own = Vectors.rows

    def rows(self: Vectors, first: int, last: int) -> Floats:
        read.append((self.folder.name, first, last))
        return own(self, first, last)

    monkeypatch.setattr(Vectors, "rows", rows)
    monkeypatch.setattr(Vectors, "all", lambda self: pytest.fail("all vectors were read"))
    queries, passages = corpus(tmp_path)
    search_shards(experiment(tmp_path, **CUTS[1]), queries, passages, K)
    assert max(last - first for name, first, last in read if name == "passages") == 64
    assert max(last - first for name, first, last in read if name == "queries") == 10


PEAK = """
import json, sys
from pathlib import Path
import numpy as np
from rayembed.data.store import Store
from rayembed.jobs import ranking

def peak():  # of this program; ru_maxrss counts from that of the process that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

what, *folders = sys.argv[1:]
for folder in map(Path, folders):
    if what == "merge":
        ranking.ShardTops(folder / "tops", Store.open(folder / "passages-store")).merged(0, 128, 100)
    else:
        arguments = json.loads((folder / "arguments.json").read_text())
        worker = ranking.SearchWorker(**arguments, threads=1, use_gpu=False)
        worker({"shard": [0, int(folder.name)], "block": [0, 128]}, "x", folder)
    print(peak())
"""


def peaks(what: str, *folders: Path) -> list[float]:
    """MiB after each folder, in one process."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK, what, *folders],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [float(line) for line in found.stdout.split()]


def test_peak_memory_of_a_merge_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    """All of 400 shards at once are 61 MB before anything is done with them."""
    for shards in (40, 400):
        rng, folder = np.random.default_rng(shards), tmp_path / str(shards)
        (folder / "tops").mkdir(parents=True)
        stored(
            folder, "passages", np.zeros((shards * 100, 1), np.float32), [f"d{i}" for i in range(shards * 100)], 8192
        )
        for shard in range(shards):
            scores = -np.sort(-rng.integers(0, 2**20, (128, 100)), axis=1) / np.float32(2**20)
            rows = shard * 100 + rng.permuted(np.tile(np.arange(100), (128, 1)), axis=1)
            name = ranking.unit_name((shard * 100, shard * 100 + 100), (0, 128))
            ranking.save_top(folder / "tops", name, scores.astype(np.float32), rows)
        cut = {"passages": shards * 100, "passages_per_unit": 100, "queries": 128, "queries_per_unit": 128}
        (folder / "tops" / RECORD).write_text(json.dumps(cut))
    few, many = peaks("merge", tmp_path / "40", tmp_path / "400")
    assert many - few < 20, f"{few:.0f} MiB over 40 shards, {many:.0f} MiB over 400"


def test_peak_memory_of_a_search_does_not_grow_with_the_shard(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 passages of 128 dimensions are 51 MB, a piece of 4096 is 2 MB."""
    arguments: dict[str, Any] = {}

    def caught(units: Sequence[Unit], work: Work, config: RayConfig, **_: object) -> list[dict[str, Any]]:
        arguments.update(work.arguments)
        return []

    monkeypatch.setattr(ranking, "run_units", caught)
    rng = np.random.default_rng(1)
    for passages in (20_000, 100_000):
        folder = tmp_path / str(passages)
        folder.mkdir()
        ids = [str(i) for i in range(passages)]
        corpus = stored(folder, "passages", rng.standard_normal((passages, 128), np.float32), ids, 4096)
        queries = stored(folder, "queries", rng.standard_normal((128, 128), np.float32), ids[:128], 128)
        monkeypatch.setattr(ranking, "write_atomic", lambda *_: None)
        search_shards(experiment(folder, passages_per_index=4096), queries, corpus, 50)
        (folder / "arguments.json").write_text(json.dumps(arguments))
    few, many = peaks("search", tmp_path / "20000", tmp_path / "100000")
    assert many - few < 20, f"{few:.0f} MiB over 20,000 passages, {many:.0f} MiB over 100,000"
