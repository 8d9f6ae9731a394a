"""Headers of given embeddings tell what cannot be used before anything is read; blocks give each row once, in order."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from rayembed.data import embeddings
from rayembed.data.embeddings import check_count, embedding_paths, ids_path, read_blocks, read_headers, read_rows
from rayembed.data.problems import DataError

VECTORS = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float32)
IDS = [f"p{i}" for i in range(10)] + ['é "quoted", \\ and long ' * 3]


def parquet(
    path: Path, vectors: NDArray[np.floating], ids: list[str], *, column: str = "vector", group: int = 4
) -> None:
    """Written as lists of one length."""
    flat = pa.array(vectors.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pq.write_table(pa.table({"id": ids, column: lists}), path, row_group_size=group)


def parquet_of_lists(path: Path, vectors: NDArray[np.floating], ids: list[str]) -> None:
    """Written as lists of any length, the column last of four."""
    lists = pa.array(vectors.tolist(), pa.large_list(pa.from_numpy_dtype(vectors.dtype)))
    columns = {"id": pa.array(ids).dictionary_encode(), "text": ids, "other": [[1.0]] * len(ids), "embedding": lists}
    pq.write_table(pa.table(columns), path, row_group_size=4)


def npy(path: Path, vectors: NDArray[np.floating], ids: list[str]) -> None:
    np.save(path.with_suffix(".npy"), vectors)
    path.with_suffix(".ids.json").write_text(json.dumps(ids))


def test_the_files_of_a_folder_are_those_that_hold_vectors(tmp_path: Path) -> None:
    for name in ("b.npy", "b.ids.json", "a.npy", "_x.npy", ".y.npy", "int8_ranges.json", "c.parquet", "d.txt"):
        (tmp_path / name).touch()
    found = embedding_paths([str(tmp_path)], setting="mine.corpus_embeddings")
    assert found == [str(tmp_path / name) for name in ("a.npy", "b.npy", "c.parquet")]
    assert embedding_paths([f"{tmp_path}/*.npy"], setting="") == found[:2]
    assert embedding_paths([found[1], found[0]], setting="") == [found[1], found[0]], "paths keep their order"
    assert embedding_paths([f"file://{tmp_path}"], setting="") == [f"file://{name}" for name in found]
    (tmp_path / "part-00000.npy").touch()
    assert embedding_paths([str(tmp_path)], setting="") == [str(tmp_path / "part-00000.npy")]
    assert ids_path(found[1]) == str(tmp_path / "b.ids.json")
    assert ids_path(found[0]) is None
    with pytest.raises(DataError, match=r"mine\.corpus_embeddings: '.*nowhere' names no file; allowed are"):
        embedding_paths([str(tmp_path / "nowhere")], setting="mine.corpus_embeddings")


def test_local_files_are_absolute_since_workers_have_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.npy").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("given", "given/a.npy", "./given/*.npy", "~/given/a.npy", f"file://{tmp_path}/given"):
        scheme = "file://" if "://" in path else ""
        assert embedding_paths([path], setting="") == [f"{scheme}{tmp_path}/given/a.npy"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("write", [parquet, parquet_of_lists, npy])
def test_blocks_give_every_row_once_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], dtype: type[np.floating]
) -> None:
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 8 * 6 * 3)
    monkeypatch.setattr(embeddings, "CHARACTERS", 16)
    write(tmp_path / "x.parquet", VECTORS.astype(dtype), IDS)
    (file,) = read_headers([str(tmp_path)], setting="")
    assert (file.num_rows, file.dimension) == (11, 6)
    assert file.groups == ((11,) if write is npy else (4, 4, 3))
    blocks = list(read_blocks(file, 0, len(file.groups), normalize=False))
    assert [block.first_row for block in blocks] == list(np.cumsum([0, *(len(block.ids) for block in blocks)])[:-1])
    assert max(len(block.ids) for block in blocks) == 3
    assert [name for block in blocks for name in block.ids] == IDS
    found = np.concatenate([block.vectors for block in blocks])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTORS.astype(dtype).astype(np.float32))
    if write is not npy:
        part = list(read_blocks(file, 1, 2, normalize=False))
        assert part[0].first_row == 4
        assert [name for block in part for name in block.ids] == IDS[4:8]


def test_rows_of_npy_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 8 * 6 * 2)
    np.save(tmp_path / "x.npy", VECTORS.astype(">f4"))
    (file,) = read_headers([str(tmp_path)], setting="")
    found = list(read_rows(file, 3, 8, normalize=False))
    assert [row for row, _ in found] == [3, 5, 7]
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), VECTORS[3:8])


def test_whole_numbers_are_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [7, 8], "vector": [[1.0, 2.0], [3.0, 4.0]]}), tmp_path / "x.parquet")
    np.save(tmp_path / "y.npy", np.ones((2, 2), np.float32))
    (tmp_path / "y.ids.json").write_text(" [ 7 ,\n8 ]\n")
    for name in ("x.parquet", "y.npy"):
        (file,) = read_headers([str(tmp_path / name)], setting="")
        assert [block.ids for block in read_blocks(file, 0, 1, normalize=False)] == [["7", "8"]]


def test_vectors_get_length_1_and_keep_their_bits_where_they_have_it() -> None:
    once = embeddings.unit_length((VECTORS * np.array([[1e-4], [1e4]] * 5 + [[1.0]])).astype(np.float32))
    exact = VECTORS.astype(np.float64)
    np.testing.assert_allclose(once, exact / np.linalg.norm(exact, axis=1, keepdims=True), atol=1e-7)
    nudged = np.nextafter(once, np.float32(2))
    np.testing.assert_array_equal(embeddings.unit_length(nudged), nudged)
    np.testing.assert_array_equal(embeddings.unit_length(np.zeros((1, 6), np.float32)), np.zeros((1, 6)))
    nearly = (once * 1.00001).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(embeddings.unit_length(nearly), axis=1), 1, atol=2e-7)


def test_files_of_no_rows_count_for_nothing(tmp_path: Path) -> None:
    empty = pa.table({"id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))})
    pq.write_table(empty, tmp_path / "part-0.parquet")
    with pytest.raises(DataError, match=r"mine\.x: its files hold no vector"):
        read_headers([str(tmp_path)], setting="mine.x")
    parquet(tmp_path / "part-1.parquet", VECTORS, IDS)
    assert [file.num_rows for file in read_headers([str(tmp_path)], setting="mine.x")] == [11]


def write_table(**columns: object) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "x.parquet")


def save(array: NDArray[np.generic]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "x.npy", array)


def text(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("text")

    return write


def cut(folder: Path) -> None:
    np.save(folder / "x.npy", VECTORS)
    data = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(data[:-10])


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (write_table(name=["a"], emb=[[1.0]]), "found the columns name, emb; allowed: id, and vector or embedding"),
    (write_table(id=["a"], emb=[[1.0]]), "found the columns id, emb; allowed: id, and vector or embedding"),
    (write_table(id=["a"], vector=[1.0]), "column vector holds double, allowed: lists of float16, float32 or float64"),
    (write_table(id=[0.5], vector=[[1.0]]), "column id holds double, allowed: texts or whole numbers"),
    (write_table(id=["a", "b"], vector=[[1.0, 2.0], [1.0]]), "lists of column vector are not all of one length"),
    (write_table(id=["a"], vector=pa.array([[1]], pa.list_(pa.int8()))), "type int8, allowed: .*; quantised vectors"),
    (write_table(id=["a"], vector=pa.array([[1]], pa.list_(pa.int64()))), "type int64, allowed: [^;]*$"),
    (save(VECTORS.astype(np.uint8)), r"type uint8, allowed: .*; quantised .* encode\.output_dtype float32 or float16"),
    (save(VECTORS.astype(np.int32)), "type int32, allowed"),
    (save(VECTORS[0]), r"found an array of shape \[6\], allowed: \[vectors, dimensions\]"),
    (save(np.asfortranarray(VECTORS)), "found columns one after the other"),
    (cut, "it ends 10 bytes early"),
    (text("x.npy"), "not readable as npy"),
    (text("x.parquet"), "not readable as parquet"),
]


@pytest.mark.parametrize(("write", "message"), REFUSED)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=rf"(?s)^mine\.x: .*x\.(npy|parquet): .*{message}"):
        read_headers([str(tmp_path)], setting="mine.x")


def test_every_bad_file_is_named_up_to_five(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.npy").write_bytes(b"text")
    with pytest.raises(DataError, match=r"(?s)0\.npy.*4\.npy.*and 2 more"):
        read_headers([str(tmp_path)], setting="mine.x")
    (tmp_path / "own.txt").touch()
    with pytest.raises(DataError, match=r"own\.txt: unknown format; allowed are \.parquet, \.npy"):
        read_headers([str(tmp_path / "own.txt")], setting="mine.x")


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", VECTORS, IDS)
    npy(tmp_path / "b", VECTORS, IDS)
    with pytest.raises(DataError, match=r"different forms: .*a\.parquet \(parquet\) and .*b\.npy \(npy with ids"):
        read_headers([str(tmp_path)], setting="mine.x")
    parquet(tmp_path / "c.parquet", VECTORS[:, :4].copy(), IDS)
    with pytest.raises(DataError, match=r"different dimensions: .*a\.parquet \(6\) and .*c\.parquet \(4\)"):
        read_headers([f"{tmp_path}/*.parquet"], setting="mine.x")


def test_files_without_ids_are_refused_where_their_order_is_doubtful(tmp_path: Path) -> None:
    for i in (2, 10):
        np.save(tmp_path / f"x-{i}.npy", VECTORS)
    with pytest.raises(DataError, match=r"in which x-10\.npy comes before x-2\.npy; write the numbers with zeros"):
        read_headers([str(tmp_path)], setting="mine.x")
    listed = [str(tmp_path / f"x-{i}.npy") for i in (2, 10)]
    assert [file.path for file in read_headers(listed, setting="mine.x")] == listed
    for i in (2, 10):
        npy(tmp_path / f"x-{i}", VECTORS, IDS)
    assert len(read_headers([str(tmp_path)], setting="mine.x")) == 2, "ids tell the order"


def test_too_few_or_too_many_vectors_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VECTORS)
    ordered = read_headers([str(tmp_path)], setting="mine.x")
    check_count(ordered, 11, setting="mine.x", ids_unique=True)
    for rows in (10, 12):
        with pytest.raises(DataError, match=rf"mine\.x: 1 file with 11 vectors for {rows} texts; .* exactly"):
            check_count(ordered, rows, setting="mine.x", ids_unique=False)
    npy(tmp_path / "x", VECTORS, IDS)
    named = read_headers([str(tmp_path)], setting="mine.x")
    check_count(named, 10, setting="mine.x", ids_unique=True)
    check_count(named, 12, setting="mine.x", ids_unique=False)
    with pytest.raises(DataError, match=r"with 11 vectors for 12 texts; allowed: at least as many"):
        check_count(named, 12, setting="mine.x", ids_unique=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_number_that_is_not_finite_is_found(tmp_path: Path, value: float) -> None:
    vectors = VECTORS.astype(np.float64)
    vectors[7, 2] = value
    np.save(tmp_path / "x.npy", vectors)
    parquet(tmp_path / "y.parquet", vectors, IDS)
    for name in ("x.npy", "y.parquet"):
        (file,) = read_headers([str(tmp_path / name)], setting="")
        with pytest.raises(DataError, match=rf"{name}: row 7 \(counted from 0\) has a number that is not finite"):
            list(
                read_rows(file, 5, 11, normalize=False) if name == "x.npy" else read_blocks(file, 1, 3, normalize=True)
            )


@pytest.mark.parametrize("odd", [None, [], [1.0, 2.0, 3.0], [1.0, None]])
def test_a_list_that_is_not_like_the_others_is_found(tmp_path: Path, odd: list[float] | None) -> None:
    filler = [5.0] * (4 - max(1, len(odd or ())))  # as many numbers in all as 7 lists of 2 have
    rows = [*([[1.0, 2.0]] * 5), odd, filler]
    pq.write_table(
        pa.table({"id": list("abcdefg"), "vector": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "x.parquet"
    )
    (file,) = read_headers([str(tmp_path)], setting="")
    expected = "not finite" if odd == [1.0, None] else f"has {len(odd or ())} numbers, others have 2"
    with pytest.raises(DataError, match=rf"row 5 \(counted from 0\) .*{expected}"):
        list(read_blocks(file, 0, 1, normalize=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(IDS[:-1]), "holds 10 ids for 11 vectors"),
        (json.dumps([*IDS, "x"]), "holds more ids than the 11 vectors"),
        (json.dumps([*IDS[:-1], None]), r"id 10 \(counted from 0\) is no text or whole number"),
        (json.dumps({"ids": IDS}), "is not a JSON list"),
        (json.dumps(IDS)[:-1], r"id 10 \(counted from 0\) is no text"),
    ],
)
def test_ids_that_are_not_those_of_the_vectors_are_refused(tmp_path: Path, text: str, message: str) -> None:
    npy(tmp_path / "x", VECTORS, IDS)
    (tmp_path / "x.ids.json").write_text(text)
    (file,) = read_headers([str(tmp_path)], setting="")
    with pytest.raises(DataError, match=rf"x\.ids\.json.*{message}"):
        list(read_blocks(file, 0, 1, normalize=False))


def test_a_missing_id_is_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", None], "vector": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    (file,) = read_headers([str(tmp_path)], setting="")
    with pytest.raises(DataError, match=r"x\.parquet: row 1 \(counted from 0\) has no id"):
        list(read_blocks(file, 0, 1, normalize=False))
