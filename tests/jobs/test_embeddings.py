"""Given embeddings become the vectors that encoding gives, in any form and order; what is incomplete is refused."""

import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.data.embeddings import PARQUET, EmbeddingFile
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.problems import DataError
from rayembed.data.store import ROWS, Store, StoreWriter
from rayembed.jobs import embeddings, units
from rayembed.jobs.embeddings import check_given, given_vectors, reads_of_embeddings, rows_at_once
from rayembed.jobs.units import UnitError
from tests.jobs.conftest import MakeExperiment
from tests.jobs.toy_data import NUM_PASSAGES, NUM_TRAIN
from tests.jobs.units_here import UnitsHere

SETTING = "mine.corpus_embeddings"
Write = Callable[[Path, Sequence[str], NDArray[np.float32]], None]


@pytest.fixture(scope="module")
def experiment(make_experiment: MakeExperiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return make_experiment(tmp_path_factory.mktemp("given") / "run")


@pytest.fixture(scope="module")
def prepared(experiment: Experiment) -> Prepared:
    return prepare(experiment, evaluation=False)


@pytest.fixture(scope="module")
def corpus(prepared: Prepared) -> Store:
    assert prepared.corpus is not None
    return prepared.corpus


def ids_of(store: Store, column: str = "id") -> list[str]:
    return [name for part in store.iter_parts([column]) for name in part.column(column).to_pylist()]


def own_vectors(count: int, dimension: int = 8) -> NDArray[np.float32]:
    """Of length 1, each another."""
    vectors = np.random.default_rng(count).standard_normal((count, dimension))
    scaled: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def parquet(path: Path, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
    table = pa.table(
        {"id": list(ids), "vector": vectors.tolist()}, pa.schema({"id": pa.string(), "vector": pa.list_(pa.float32())})
    )
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=9)


def npy(path: Path, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
    np.save(path.with_suffix(".npy"), vectors)
    path.with_suffix(".ids.json").write_text(json.dumps(list(ids)))


def bare_npy(path: Path, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
    np.save(path.with_suffix(".npy"), vectors)


def write_cut(
    folder: Path, write: Write, ids: Sequence[str], vectors: NDArray[np.float32], cuts: Sequence[int]
) -> None:
    """Files of the rows between the cuts."""
    folder.mkdir()
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, len(ids)], strict=True)):
        write(folder / f"x-{number:02d}", ids[first:last], vectors[first:last])


def shuffled(ids: Sequence[str], vectors: NDArray[np.float32]) -> tuple[list[str], NDArray[np.float32]]:
    order = random.Random(3).sample(range(len(ids)), len(ids))
    return [ids[i] for i in order], vectors[order]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> UnitsHere:
    found = UnitsHere()
    monkeypatch.setattr(units, "_stream", found.stream)
    monkeypatch.setattr(embeddings, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(embeddings, "COPIED_ROWS", 7)
    return found


@pytest.mark.parametrize("write", [parquet, npy])
@pytest.mark.parametrize("cuts", [[], [13, 14, 90], list(range(1, NUM_PASSAGES))])
def test_vectors_find_their_rows_whatever_the_order_and_the_files(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path, write: Write, cuts: list[int]
) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES)
    write_cut(tmp_path / "files", write, *shuffled(ids, vectors), cuts)
    found = given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors)
    assert found.part(2).dtype == np.float32
    assert (found.dimension, len(found.part(0)), len(found.part(2))) == (8, 50, 20)
    assert not (found.folder / "runs").exists()
    before = len(here.done)
    given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    assert len(here.done) == before, "from the cache"


@pytest.mark.parametrize("by", [1, -1])
def test_runs_that_share_one_row_with_a_part_give_it(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path, by: int
) -> None:
    vectors, order = own_vectors(NUM_PASSAGES), np.roll(np.arange(NUM_PASSAGES), by)  # runs and parts are of 50 rows
    ids = ids_of(corpus)
    npy(tmp_path / "x", [ids[i] for i in order], vectors[order])
    found = given_vectors(experiment, corpus, [str(tmp_path / "x.npy")], setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors)


@pytest.mark.parametrize("cuts", [[], [13, 14, 90]])
def test_files_without_ids_are_in_the_order_of_the_corpus(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path, cuts: list[int]
) -> None:
    vectors = own_vectors(NUM_PASSAGES)
    write_cut(tmp_path / "files", bare_npy, ids_of(corpus), vectors, cuts)
    found = given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors)


def test_rows_of_one_query_share_its_vector(here: UnitsHere, experiment: Experiment, tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "rows", ROWS, 4)
    names = ["b", "a", "b", "c", "a", "b", "d"]
    for name in names:
        writer.add({"query_id": name, "query": name, "pos": ["p"], "neg": [], "dataset": "x"})
    store = writer.finish()
    vectors = own_vectors(4)
    write_cut(tmp_path / "files", parquet, ["d", "a", "c", "b"], vectors, [2])
    found = given_vectors(
        experiment, store, [str(tmp_path / "files")], setting="mine.query_embeddings", id_of="query_id"
    )
    np.testing.assert_array_equal(found.all(), [vectors["dacb".index(name)] for name in names])


def test_vectors_are_scaled_to_length_1_as_the_model_says(
    here: UnitsHere, make_experiment: MakeExperiment, corpus: Store, tmp_path: Path
) -> None:
    vectors = own_vectors(NUM_PASSAGES) * np.float32(3)
    npy(tmp_path / "x", ids_of(corpus), vectors)
    scaled = given_vectors(make_experiment(tmp_path / "run"), corpus, [str(tmp_path / "x.npy")], setting=SETTING)
    np.testing.assert_allclose(scaled.all(), vectors / 3, atol=1e-7)
    as_they_are = make_experiment(tmp_path / "run", model={"normalize_embeddings": False})
    kept = given_vectors(as_they_are, corpus, [str(tmp_path / "x.npy")], setting=SETTING)
    np.testing.assert_array_equal(kept.all(), vectors)


def test_a_text_without_vector_is_refused_each_time_without_doing_it_again(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path
) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES)
    others = ["other" if i in (3, 77) else name for i, name in enumerate(ids)]
    write_cut(tmp_path / "files", parquet, others, vectors, [40])
    expected = (
        rf"^mine\.corpus_embeddings: 2 of 120 texts have no vector, those with the ids {ids[3]}, {ids[77]} among them; "
        r"it has 2 vectors of other ids, such as other, other\. Add the files that hold them to mine\.corpus_embeddings"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=expected):
            given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    assert len(here.done) == len(set(here.done))


@pytest.mark.parametrize("cuts", [[], [120]])
def test_an_id_with_two_vectors_is_refused(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path, cuts: list[int]
) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES + 1)
    write_cut(tmp_path / "files", npy, [*ids, ids[9]], vectors, cuts)
    with pytest.raises(
        ValueError, match=rf"1 of 120 texts have more than one vector, those with the ids {ids[9]} among"
    ):
        given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)


def test_vectors_of_other_texts_are_left_out_and_told(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES + 3)
    write_cut(tmp_path / "files", npy, ["x", "y", *ids, "x"], vectors, [60])
    with caplog.at_level(logging.WARNING):
        found = given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors[2:-1])
    assert "3 of 123 vectors are left out, their ids are those of no text (x, y, x)" in caplog.text


def test_what_was_read_before_a_kill_is_not_read_again(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path
) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES)
    write_cut(tmp_path / "files", npy, *shuffled(ids, vectors), [50, 100])
    for stop in ("run-00000", "parts-00000"):
        here.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    here.stop_at = None
    found = given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors)
    expected = [f"runs/run-{i:05d}" for i in (2, 1, 0)] + [f"{found.folder.name}/parts-{i:05d}" for i in (2, 1, 0)]
    assert here.done == expected, "each once"


def test_a_changed_file_is_read_anew(here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES)
    npy(tmp_path / "x", ids, vectors)
    paths = [str(tmp_path / "x.npy")]
    reads = reads_of_embeddings(paths)
    given_vectors(experiment, corpus, paths, setting=SETTING)
    npy(tmp_path / "x", ids[::-1], vectors)
    found = given_vectors(experiment, corpus, paths, setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors[::-1])
    assert [file for file, _ in reads] == [str(tmp_path / "x.npy"), str(tmp_path / "x.ids.json")]
    assert reads_of_embeddings(paths) != reads


def test_a_unit_that_fails_names_its_rows(
    here: UnitsHere, experiment: Experiment, corpus: Store, tmp_path: Path
) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES)
    vectors[71, 0] = np.nan
    write_cut(tmp_path / "files", parquet, ids, vectors, [])
    with pytest.raises(UnitError, match=r"run-00001 \(from row 45 of .*x-00\.parquet on\).*x-00\.parquet: row 71 "):
        given_vectors(experiment, corpus, [str(tmp_path / "files")], setting=SETTING)


def test_units_read_as_many_row_groups_as_fit() -> None:
    """Of 5 rows at most, unless one group alone has more."""
    groups = [(2, 3, 1), (4,), (1, 9), (2, 2, 1, 1)]
    files = [
        EmbeddingFile(f"{name}.parquet", PARQUET, "vector", own, 8) for name, own in zip("abcd", groups, strict=True)
    ]
    found = [(unit.size, unit.spec["pieces"]) for unit in embeddings._reading_units(files, 5)]
    assert found == [
        (5, [[0, 0, 2]]),
        (5, [[0, 2, 3], [1, 0, 1]]),
        (1, [[2, 0, 1]]),
        (9, [[2, 1, 2]]),
        (5, [[3, 0, 3]]),
        (1, [[3, 3, 4]]),
    ]


def test_a_worker_holds_256_megabytes() -> None:
    assert rows_at_once(384) == 65536
    assert rows_at_once(1024) == 65536
    assert rows_at_once(4096) * 4096 * 4 == 256 << 20


def test_headers_are_checked_before_anything_runs(
    make_experiment: MakeExperiment, prepared: Prepared, corpus: Store, tmp_path: Path
) -> None:
    assert prepared.rows is not None
    rows = prepared.rows
    queries = list(dict.fromkeys(ids_of(rows, "query_id")))
    npy(tmp_path / "corpus", ids_of(corpus), own_vectors(NUM_PASSAGES, 64))
    npy(tmp_path / "queries", queries, own_vectors(len(queries), 64))
    npy(tmp_path / "small", queries, own_vectors(len(queries), 8))

    def check(**mine: Any) -> None:  # noqa: ANN401
        given = {key: [str(tmp_path / f"{name}.npy")] for key, name in mine.items()}
        check_given(make_experiment(tmp_path / "run", mine=given), rows, corpus)

    check()
    check(corpus_embeddings="corpus")
    check(corpus_embeddings="corpus", query_embeddings="queries")
    with pytest.raises(
        ValueError, match=r"corpus_embeddings has vectors of 64 dimensions, mine\.query_embeddings of 8;"
    ):
        check(corpus_embeddings="corpus", query_embeddings="small")
    with pytest.raises(
        ValueError, match=r"query_embeddings has vectors of 8 .*tiny-model.* encodes what is not given, of 64"
    ):
        check(query_embeddings="small")
    with pytest.raises(DataError, match=rf"corpus_embeddings: .* with {NUM_TRAIN} vectors for {NUM_PASSAGES} texts"):
        check(corpus_embeddings="queries")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_vectors_find_their_rows_on_ray(experiment: Experiment, corpus: Store, tmp_path: Path) -> None:
    ids, vectors = ids_of(corpus), own_vectors(NUM_PASSAGES)
    write_cut(tmp_path / "files", parquet, *shuffled(ids, vectors), [31, 60])
    found = given_vectors(experiment, corpus, [f"file://{tmp_path}/files"], setting=SETTING)
    np.testing.assert_array_equal(found.all(), vectors)
