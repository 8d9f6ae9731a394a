"""Files on a store: whole or not at all, tried again, and an error that says what is safe and what to do."""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from rayembed.data import object_store
from rayembed.data.object_store import Found, ObjectStore, StoreError
from tests.s3_server import Server, serving

PIECE = 64


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A folder of this machine, in the place of a server."""
    monkeypatch.setattr(object_store, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(object_store, "PIECE", PIECE)
    return ObjectStore("s3://bucket/run?region=x", fs.LocalFileSystem(), str(tmp_path / "store"))


def written(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_files_go_there_and_back_with_size_and_time(store: ObjectStore, tmp_path: Path) -> None:
    content = bytes(range(256))  # several pieces
    sent = store.put("deep/er/a b.npy", written(tmp_path, "a", content))
    assert sent.size == 256
    assert store.find("deep/er/a b.npy") == sent
    assert store.list() == {"deep/er/a b.npy": sent}
    assert store.get("deep/er/a b.npy", tmp_path / "new" / "b") == sent
    back = tmp_path / "new" / "b"
    assert (back.read_bytes(), back.stat().st_mtime_ns) == (content, sent.seconds * 10**9)
    assert [path.name for path in back.parent.iterdir()] == ["b"]
    assert store.named("deep/x") == "s3://bucket/run/deep/x"


def test_what_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    assert store.find("x") is None
    assert store.list("x") == {}
    assert store.get("x", tmp_path / "x") is None
    store.delete("x")
    store.delete_all("x")
    store.put_mark("x/y")
    assert store.find("x") is None, "a folder"
    assert store.find("x/y") == Found(0, store.list()["x/y"].seconds)
    store.delete_all("x")
    assert store.list() == {}
    assert not list(tmp_path.glob("x*"))


def test_a_listing_shows_the_folder_alone_or_all_below_it(store: ObjectStore) -> None:
    for key in ("a", "b/c", "b/d/e", "b/.hidden", "bb"):
        store.put_mark(key)
    assert set(store.list()) == {"a", "b/c", "b/d/e", "bb"}
    assert set(store.list("b", recursive=False)) == {"b/c"}


def test_a_file_that_ends_while_it_is_read_is_not_there_in_part(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "a", b"x" * 3 * PIECE)

    class Breaks:
        def __init__(self, file: object) -> None:
            self._file, self._reads = file, 0

        def read(self, size: int) -> bytes:
            self._reads += 1
            if self._reads == 3:
                raise OSError(errno.EIO, "the disk is broken")
            return self._file.read(size)  # type: ignore[attr-defined, no-any-return]

        def __enter__(self) -> "Breaks":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()  # type: ignore[attr-defined]

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda own, mode: Breaks(opened(own, mode)))
    with pytest.raises(StoreError, match=r"writing s3://bucket/run/a \(192 bytes\) failed: .*the disk is broken"):
        store.put("a", path)
    assert store.list() == {}


def failing(times: int, error: OSError, then: Callable[..., object]) -> Callable[..., object]:
    """A method that fails some times before it does what it should."""
    left = [error] * times

    def method(*arguments: object) -> object:
        if left:
            raise left.pop()
        return then(*arguments)

    return method


def test_it_is_tried_again_and_said(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, "a", b"1")
    for times, fails in ((2, False), (3, True)):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(ObjectStore, "_put", failing(times, OSError("slow down\nmore"), ObjectStore._put))
            if fails:
                with pytest.raises(
                    StoreError, match=r"run/a \(1 bytes\) failed: slow down; what .* whole\. Run the same"
                ):
                    store.put("a", path)
            else:
                store.put("a", path)
    assert len([line for line in caplog.messages if "another try in 0 s: slow down" in line]) == 4


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError("AWS Error ACCESS_DENIED during PutObject"), r"Give the driver and all workers the rights"),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), r"Create the bucket, or set output_dir"),
        (OSError(errno.ENOSPC, "No space left on device"), r"Make room there, or set RAYEMBED_SCRATCH"),
    ],
)
def test_what_no_other_try_helps_is_told_at_once(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, advice: str
) -> None:
    store.put_mark("a")
    monkeypatch.setattr(ObjectStore, "_get", failing(1, error, ObjectStore._get))
    with pytest.raises(StoreError, match=f"reading s3://bucket/run/a to .* failed: .*; nothing was changed. {advice}"):
        store.get("a", tmp_path / "a")


def test_a_file_that_arrives_short_is_not_there(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", written(tmp_path, "a", b"12345"))
    wrong = Found(7, 0)
    monkeypatch.setattr(object_store, "_found", lambda _: wrong)
    with pytest.raises(StoreError, match="5 bytes arrived, of 7"):
        store.get("a", tmp_path / "b")
    assert [path.name for path in tmp_path.glob("*b*")] == []


def test_a_bucket_is_never_deleted(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a bucket"):
        ObjectStore("s3://bucket", fs.LocalFileSystem(), "bucket").delete_all("")


def test_transfers_go_side_by_side_and_the_first_error_ends_them(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    object_store.in_parallel("send", [1] * 50, done.append)
    assert sorted(done) == list(range(50))

    def third(number: int) -> None:
        if number == 2:
            raise StoreError("third")
        time.sleep(0.01)
        done.append(number)

    done.clear()
    with pytest.raises(StoreError, match="third"):
        object_store.in_parallel("send", [1] * 5000, third)
    assert len(done) < 2500, "the others are left"


def test_long_transfers_tell_how_far_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "TELL_AFTER", 0.0)
    monkeypatch.setattr(object_store, "TELL_EVERY", 0.0)
    with caplog.at_level(logging.INFO):
        object_store.in_parallel("send to s3://b", [1_000_000] * 3, lambda _: None)
    assert "send to s3://b: 2 of 3 files, 2.0 of 3.0 MB" in caplog.messages
    assert caplog.messages[-1].startswith("send to s3://b: 3 files, 3.0 MB took")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(monkeypatch, tmp_path, proxy=True) as running:
        yield running


@pytest.mark.parametrize("how", ["500", "cut"])
def test_a_server_that_fails_in_the_middle_keeps_what_was_there(server: Server, tmp_path: Path, how: str) -> None:
    """Of a file in several parts the second does not arrive."""
    store = ObjectStore.open(server.uri("run"))
    large = written(tmp_path, "large", b"a" * (12 << 20))
    before = store.put("x", large)
    large.write_bytes(b"b" * (12 << 20))
    server.failing, server.how = "partNumber=2", how
    with pytest.raises(StoreError, match=r"writing s3://bucket/run/x \(12,582,912 bytes\) failed"):
        store.put("x", large)
    assert server.failures
    assert store.find("x") == before
    assert server.files("run")["x"][:1] == b"a"
    server.failing = ""
    store.put("x", large)
    assert server.files("run")["x"][-1:] == b"b"
