"""Paths are expanded in one order on every filesystem; what is written is whole or absent."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from rayembed.data import storage
from rayembed.data.problems import Report
from rayembed.data.readers import READERS, read_records
from tests.s3_server import plain_server


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a.json",
        "c.parquet",
        "readme.txt",
        "_left.jsonl",
        ".hidden.jsonl",
        "deep/d.jsonl",
        "deep/e/f.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    return tmp_path


def names(tree: Path, found: list[str]) -> list[str]:
    return [os.path.relpath(path, tree) for path in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.json", "b.jsonl", "c.parquet"]),
        ("/", ["a.json", "b.jsonl", "c.parquet"]),
        ("/b.jsonl", ["b.jsonl"]),
        ("/readme.txt", ["readme.txt"]),
        ("/*.json*", ["a.json", "b.jsonl"]),
        ("/[bc].*", ["b.jsonl", "c.parquet"]),
        ("/?.json", ["a.json"]),
        ("/*/*.jsonl", ["deep/d.jsonl"]),
        ("/**/*.jsonl", ["b.jsonl", "deep/d.jsonl", "deep/e/f.jsonl"]),
        ("/deep/**", ["deep/d.jsonl", "deep/e/f.jsonl"]),
    ],
)
def test_files_folders_and_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(tree, storage.expand(str(tree) + pattern)) == expected
    assert names(tree, [p.removeprefix("file://") for p in storage.expand(f"file://{tree}/b.jsonl")]) == ["b.jsonl"]


def test_relative_paths_stay_relative(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert storage.expand("*.jsonl") == ["b.jsonl"]
    assert storage.expand("deep") == ["deep/d.jsonl"]
    assert storage.expand("./deep/*.jsonl") == ["./deep/d.jsonl"]


def test_a_wildcard_in_the_name_of_a_file_that_exists_is_no_glob(tree: Path) -> None:
    odd = tree / "x[1].jsonl"
    odd.write_text("{}")
    assert storage.expand(str(odd)) == [str(odd)]


def test_uris_with_spaces_are_opened_again(tree: Path) -> None:
    (tree / "deep" / "g h.jsonl").write_text('{"query": 1}\n')
    found = storage.expand(f"file://{tree}/deep/*.jsonl")
    assert found == [f"file://{tree}/deep/d.jsonl", f"file://{tree}/deep/g%20h.jsonl"]
    assert storage.open_input(found[1]).read() == b'{"query": 1}\n'


def test_of_a_folder_that_a_job_wrote_only_the_parts_are_read(tmp_path: Path) -> None:
    for name in ("part-00001.jsonl", "part-00000.jsonl", "stats.json"):
        (tmp_path / name).write_text("{}")
    assert names(tmp_path, storage.expand(str(tmp_path))) == ["part-00000.jsonl", "part-00001.jsonl"]


@pytest.mark.parametrize("path", ["nothing.jsonl", "no*.jsonl", "deep/e/*.parquet"])
def test_names_the_path_that_matches_nothing(tree: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"names no file; allowed are"):
        storage.expand(str(tree / path))


def test_a_listing_is_sorted_whatever_the_filesystem_says(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reversed:
        def get_file_info(self, what: object) -> object:
            found = fs.LocalFileSystem().get_file_info(what)
            return sorted(found, key=lambda info: info.path, reverse=True) if isinstance(found, list) else found

    monkeypatch.setattr(storage, "_locate", lambda path: (Reversed(), path))
    assert names(tree, storage.expand(str(tree))) == ["a.json", "b.jsonl", "c.parquet"]


def test_every_known_suffix_has_a_reader() -> None:
    assert tuple(READERS) == storage.SUFFIXES


def test_stamp_changes_with_the_contents(tree: Path) -> None:
    path = tree / "b.jsonl"
    before = storage.stamp(str(path))
    assert before == storage.stamp(str(path))
    path.write_text("{}\n{}\n")
    assert storage.stamp(str(path)) != before
    assert storage.stamp(str(tree / "nothing")) == "missing"


def test_keys_of_a_uri_are_not_shown() -> None:
    uri = "s3://key:secret/with/slash@bucket/a/b.jsonl?region=us-east-1"
    assert storage.identity(uri) == "s3://bucket/a/b.jsonl"
    assert storage.join("s3://key:secret@bucket/a/?region=x", "b") == "s3://key:secret@bucket/a/b?region=x"


def test_identity_is_one_for_every_way_to_write_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert {storage.identity(path) for path in ("a/b", "./a/b", "a/../a/b/", str(tmp_path / "a/b"))} == {
        str(tmp_path / "a/b")
    }


def test_fingerprint_is_of_the_value_not_of_its_order_of_keys() -> None:
    assert storage.fingerprint({"a": 1, "b": [2, "é"]}) == storage.fingerprint({"b": [2, "é"], "a": 1})
    assert storage.fingerprint([1, 2]) != storage.fingerprint([2, 1])
    assert storage.fingerprint({"a": 1}) == "015abd7f5cc57a2d"  # sha256 of {"a":1}: the same on every machine


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    storage.write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_write_atomic_changes_the_name_of_a_finished_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")
    with path.open("rb") as reader:
        storage.write_atomic(path, b"new")
        assert reader.read() == b"old"  # who reads meanwhile keeps the whole old file
    assert path.read_bytes() == b"new"


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "mine"

    def interrupted() -> None:
        with storage.whole_folder(final) as working:
            (working / "part-0").write_text("0")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not final.exists()
    with storage.whole_folder(final) as working:
        assert [path.name for path in working.iterdir()] == ["part-0"]
        assert not final.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "part-0"]
    with pytest.raises(FileExistsError, match="--overwrite"), storage.whole_folder(final):
        pass


def test_a_fresh_folder_holds_nothing_of_before(tmp_path: Path) -> None:
    final = tmp_path / "mine"
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "old").write_text("0")
    with storage.whole_folder(final, fresh=True):
        pass
    assert list(final.iterdir()) == []


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of a bucket on a local S3 server, with % for the path below it."""
    yield from plain_server(monkeypatch, "key:secret")


def test_s3_is_listed_stamped_and_read(bucket: str) -> None:
    filesystem, inner = fs.FileSystem.from_uri(bucket % "")
    filesystem.create_dir(inner)
    for name in ("rows/b.jsonl", "rows/a.jsonl", "rows/note.txt"):
        with filesystem.open_output_stream(f"{inner}/{name}") as file:
            file.write(b'{"query": "' + name.encode() + b'"}\n[]\n')
    expected = [bucket % "/rows/a.jsonl", bucket % "/rows/b.jsonl"]
    assert storage.expand(bucket % "/rows") == expected
    assert storage.expand(bucket % "/*/*.jsonl") == expected
    report = Report()
    records = [record for path in expected for record in read_records(path, report)]
    assert [record.value["query"] for record in records] == ["rows/a.jsonl", "rows/b.jsonl"]
    assert [str(p).split(": ")[0] for p in report.errors.kept["not an object"]] == [
        "s3://bucket/rows/a.jsonl:2",
        "s3://bucket/rows/b.jsonl:2",
    ]
    assert storage.stamp(expected[0]).split("-")[0] == str(len('{"query": "rows/a.jsonl"}\n[]\n'))
    assert not storage.exists(bucket % "/rows/c.jsonl")
    with pytest.raises(FileNotFoundError, match=r"'s3://bucket/none/\*.jsonl' names no file"):
        storage.expand(bucket % "/none/*.jsonl")


def test_save_npy_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.npy"
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    storage.save_npy(path, values)
    with pytest.raises(ValueError, match="allow_pickle"):
        storage.save_npy(path, np.array([{}], np.object_))
    found = np.load(path)
    assert (found.tolist(), found.dtype) == (values.tolist(), np.float16)
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_the_same_file_do_not_write_into_each_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 7 of one machine, and of another, and process 8 are all at the same unit."""
    path = tmp_path / "part-00000.npy"
    with ExitStack() as stack:
        names = []
        for host, process in (("a", 7), ("b", 7), ("a", 8)):
            monkeypatch.setattr(os, "getpid", lambda process=process: process)
            monkeypatch.setattr("socket.gethostname", lambda host=host: host)
            names.append(stack.enter_context(storage.whole_file(path)))
            names[-1].write_bytes(b"from " + host.encode())
        assert len(set(names)) == 3
        assert all(name.name.startswith(".") and name.parent == tmp_path for name in names), "no listing shows them"
        storage.save_npy(path, np.ones(3))
        assert sorted(tmp_path.iterdir()) == sorted([path, *names[:2]])
        names[2].write_bytes(b"again")
    assert path.read_bytes() == b"from a", "the last one that ended"
    assert list(tmp_path.iterdir()) == [path]
