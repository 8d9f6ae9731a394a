"""Stores give back what was added, by part, by row number and by id; half-written ones do not exist."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayembed.data import store as store_module
from rayembed.data.store import PASSAGES, QUERIES, ROWS, Row, SeenHashes, Store, StoreWriter, chunks, hash_text


def written(folder: Path, rows: list[Row], schema: pa.Schema = PASSAGES, rows_per_part: int = 4) -> Store:
    writer = StoreWriter(folder, schema, rows_per_part)
    for row in rows:
        writer.add(row)
    return writer.finish()


def passages(number: int) -> list[Row]:
    return [{"id": f"d{i}", "text": f"text {i} é"} for i in range(number)]


@pytest.mark.parametrize(("number", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (11, [4, 4, 3])])
def test_parts_hold_all_rows_in_order(tmp_path: Path, number: int, sizes: list[int]) -> None:
    store = written(tmp_path / "s", passages(number))
    assert [part.num_rows for part in store.parts] == sizes
    assert [part.first_row for part in store.parts] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert store.num_rows == number
    assert [row for part in store.iter_parts() for row in part.to_pylist()] == passages(number)
    again = Store.open(tmp_path / "s")
    assert (again.fingerprint, again.parts) == (store.fingerprint, store.parts)
    assert again.schema.equals(PASSAGES)


def test_training_rows_come_back_with_their_nulls(tmp_path: Path) -> None:
    full = {
        "query_id": "q1",
        "query": "what",
        "prompt": "",
        "pos": ["a", "b"],
        "pos_ids": ["1", "2"],
        "neg": [],
        "neg_ids": [],
        "pos_scores": [0.5, -1.0],
        "neg_scores": [],
        "dataset": "d",
        "type": "normal",
        "related_ids": ["3"],
        "label": "x",
    }
    sparse = {"query_id": "q2", "query": "who", "pos": ["c"], "neg": ["d"], "dataset": "d"}
    store = written(tmp_path / "s", [full, sparse], ROWS)
    assert store.read_part(0).to_pylist() == [full, dict.fromkeys(ROWS.names) | sparse]


def test_parts_are_mapped_not_copied(tmp_path: Path) -> None:
    store = written(tmp_path / "s", passages(3))
    before = pa.total_allocated_bytes()
    table = store.read_part(0)
    assert table.num_rows == 3
    assert pa.total_allocated_bytes() - before == 0


@pytest.mark.parametrize("columns", [None, ["text"], ["text", "id"]])
def test_take_keeps_the_given_order_and_repeats(tmp_path: Path, columns: list[str] | None) -> None:
    rows = passages(11)
    store = written(tmp_path / "s", rows)
    wanted = [10, 0, 5, 5, 4, 3, 10]
    expected = [{name: rows[i][name] for name in columns or ["id", "text"]} for i in wanted]
    assert store.take(np.array(wanted), columns).to_pylist() == expected
    assert store.take(np.array([], dtype=np.int64), columns).num_rows == 0


@pytest.mark.parametrize("row", [-1, 11])
def test_take_refuses_rows_that_are_not_there(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError, match="which has 11"):
        written(tmp_path / "s", passages(11)).take(np.array([0, row]))


def test_ids_are_found_and_absent_ones_are_minus_one(tmp_path: Path) -> None:
    store = written(tmp_path / "s", passages(11))
    assert store.find_ids(["d10", "x", "d0", "d4", "d10"]).tolist() == [10, -1, 0, 4, 10]
    assert store.find_ids([]).tolist() == []
    assert written(tmp_path / "empty", []).find_ids(["d1"]).tolist() == [-1]


def test_equal_hashes_never_give_a_wrong_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "hash_text", lambda text: hash_text(text) & 3)
    store = written(tmp_path / "s", passages(30))
    wanted = [f"d{i}" for i in range(40)]
    random.Random(0).shuffle(wanted)
    assert store.find_ids(wanted).tolist() == [int(name[1:]) if int(name[1:]) < 30 else -1 for name in wanted]


def test_fingerprint_is_of_the_contents_in_order(tmp_path: Path) -> None:
    rows = passages(9)
    first = written(tmp_path / "a", rows).fingerprint
    assert written(tmp_path / "b", rows, rows_per_part=2).fingerprint == first
    assert written(tmp_path / "c", rows[::-1]).fingerprint != first
    assert written(tmp_path / "d", [*rows[:-1], {"id": "d8", "text": "other"}]).fingerprint != first
    assert written(tmp_path / "e", rows, QUERIES).fingerprint != first


def test_a_part_has_the_fingerprint_of_its_own_rows(tmp_path: Path) -> None:
    one = written(tmp_path / "a", passages(8))
    other = written(tmp_path / "b", [{"id": "z", "text": "new"}, *passages(8)[1:]])
    assert one.parts[0].fingerprint != other.parts[0].fingerprint
    assert one.parts[1].fingerprint == other.parts[1].fingerprint


def test_a_killed_writer_leaves_no_store_and_no_old_rows(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    killed = StoreWriter(folder, PASSAGES, 1)
    for row in passages(5):
        killed.add(row)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="no finished store"):
        Store.open(folder)
    store = written(folder, passages(2))
    assert store.num_rows == 2
    assert sorted(path.name for path in folder.glob("part-*")) == ["part-00000.arrow"]
    assert not killed.working.exists()


def test_a_store_is_never_written_over(tmp_path: Path) -> None:
    written(tmp_path / "s", passages(1))
    with pytest.raises(FileExistsError):
        written(tmp_path / "s", passages(2))
    assert Store.open(tmp_path / "s").num_rows == 1


def test_seen_hashes_agree_with_a_set() -> None:
    draw = random.Random(1)
    seen, reference = SeenHashes(), set[int]()
    for _ in range(60):
        batch = [draw.randrange(400) for _ in range(draw.randrange(12))]
        expected = []
        for value in batch:
            expected.append(value in reference)
            reference.add(value)
        assert seen.add(np.array(batch, dtype=np.uint64)).tolist() == expected


def test_chunks_hold_everything_once() -> None:
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 2)) == []


def test_hashes_are_the_same_in_every_process() -> None:
    assert hash_text("d1") == 2878387810984711164  # a store that one machine wrote is searched on another
