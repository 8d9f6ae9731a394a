"""Whole files on any filesystem of pyarrow.fs: sent, fetched, listed and deleted, each tried several times.

An object store (S3, GCS, Azure) shows a file when its last byte has arrived and never half of one. Other filesystems
(HDFS) get it under a hidden name, and then its own. Credentials come from the environment or the machine's role.
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from rayembed.config.uris import public_name, split_options
from rayembed.config.wording import counted

T = TypeVar("T")
THREADS = 8  # files on their way at a time
PIECE = 16 << 20  # bytes of a request
WAITS = (1.0, 4.0, 16.0)  # seconds before another try; pyarrow's S3 has tried for some seconds itself before each
TELL_AFTER, TELL_EVERY = 5.0, 15.0  # seconds of a transfer until its first line, and between lines
WITHOUT_FOLDERS = ("s3", "gcs", "abfs")
HOPELESS = {  # in what the server says: why to try no more
    "ACCESS_DENIED": "credentials",
    "INVALID_ACCESS_KEY_ID": "credentials",
    "INVALID_CLIENT_TOKEN_ID": "credentials",
    "SIGNATURE_DOES_NOT_MATCH": "credentials",
    "NO_SUCH_BUCKET": "bucket",
}
ADVICE = {
    "credentials": "Give the driver and all workers the rights to it, by a role of their machines or by the environment"
    " (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
    "bucket": "Create the bucket, or set output_dir and cache_dir to another one",
    "room": "Make room there, or set RAYEMBED_SCRATCH to a folder on a larger disk",
    "": "Run the same command again to go on",
}
logger = logging.getLogger(__name__)


class StoreError(OSError):
    """A file could not be sent, fetched or deleted; the message says which, and what is safe."""


@dataclass(frozen=True)
class Found:
    """A file as the store has it."""

    size: int
    seconds: int
    """Time of its last change, whole seconds since 1970: S3 says no more."""


@dataclass(frozen=True)
class ObjectStore:
    """A folder of a store; keys are paths below it, with / between their parts."""

    uri: str
    filesystem: fs.FileSystem = field(compare=False)
    base: str
    """Path of the folder in the filesystem."""

    @classmethod
    def open(cls, uri: str) -> "ObjectStore":
        """The store that a URI names; asks no server yet."""
        filesystem, base = _located(uri)
        return cls(uri, filesystem, base.rstrip("/"))

    def named(self, key: str) -> str:
        """For messages: without options and keys."""
        folder = public_name(self.uri).rstrip("/")
        return f"{folder}/{key}" if key else folder

    def path(self, key: str) -> str:
        """In the filesystem."""
        return f"{self.base}/{key}" if key else self.base

    def find(self, key: str) -> Found | None:
        """The file of a key; None if there is none."""
        info = self._tried(f"looking for {self.named(key)}", lambda: self.filesystem.get_file_info(self.path(key)))
        return _found(info) if info.type == fs.FileType.File else None

    def list(self, key: str = "", *, recursive: bool = True) -> dict[str, Found]:
        """All files below a folder by their keys; of hidden ones and of folders none."""
        selector = fs.FileSelector(self.path(key), allow_not_found=True, recursive=recursive)
        infos = self._tried(f"listing {self.named(key)}", lambda: self.filesystem.get_file_info(selector))
        found = {info.path[len(self.base) + 1 :]: _found(info) for info in infos if info.type == fs.FileType.File}
        return {name: own for name, own in found.items() if not name.rsplit("/", 1)[-1].startswith(".")}

    def put(self, key: str, source: Path) -> Found:
        """Sends a local file, whole or not at all; what was there before stays until then."""
        size = source.stat().st_size
        what = f"writing {self.named(key)} ({size:,} bytes)"
        return self._tried(what, lambda: self._put(key, source), "what was there before is whole")

    def put_mark(self, key: str) -> None:
        """Writes a file with nothing in it."""
        self._tried(f"writing {self.named(key)}", lambda: self._write(key, None), "what was there before is whole")

    def get(self, key: str, target: Path) -> Found | None:
        """Fetches a file; the local one appears whole, with the size and time that the store's has. None: not there."""
        try:
            return self._tried(f"reading {self.named(key)} to {target}", lambda: self._get(key, target))
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """Deletes a file; none is as good."""

        def act() -> None:
            try:
                self.filesystem.delete_file(self.path(key))
            except FileNotFoundError:
                return

        self._tried(f"deleting {self.named(key)}", act)

    def delete_all(self, key: str) -> None:
        """Deletes the file of a key, or all files below it; none is as good."""

        def act() -> None:
            kind = self.filesystem.get_file_info(self.path(key)).type
            if kind == fs.FileType.File:
                self.filesystem.delete_file(self.path(key))
            elif kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path(key))

        assert "/" in self.path(key), "a bucket is never deleted"
        self._tried(f"deleting {self.named(key)}", act)

    def _put(self, key: str, source: Path) -> Found:
        before = source.stat()
        self._write(key, source)
        info = self.filesystem.get_file_info(self.path(key))
        if info.type != fs.FileType.File or info.size != before.st_size:
            raise OSError(f"{info.size} bytes arrived, of {before.st_size}")
        return _found(info)

    def _write(self, key: str, source: Path | None) -> None:
        path = self.path(key)
        if self.filesystem.type_name in WITHOUT_FOLDERS:
            self._stream(path, source)
            return
        folder, _, name = path.rpartition("/")
        hidden = f"{folder}/.{name}.{os.getpid()}.partial"
        self.filesystem.create_dir(folder, recursive=True)
        self._stream(hidden, source)
        self.filesystem.move(hidden, path)

    def _stream(self, path: str, source: Path | None) -> None:
        """Writes a file. Closing gives it its name, so what cannot be read to its end is deleted again."""
        if source is None:
            self.filesystem.open_output_stream(path).close()
            return
        with source.open("rb") as file:
            piece = file.read(PIECE)  # of most files all: before anything is written
            sink = self.filesystem.open_output_stream(path)
            try:
                while piece:
                    sink.write(piece)
                    piece = file.read(PIECE)
            except BaseException:
                try:
                    sink.close()
                    self.filesystem.delete_file(path)
                except OSError:
                    pass  # where writing failed, closing does too, and no file appears
                raise
            sink.close()

    def _get(self, key: str, target: Path) -> Found:
        info = self.filesystem.get_file_info(self.path(key))
        if info.type != fs.FileType.File:
            raise FileNotFoundError(self.named(key))
        found = _found(info)
        target.parent.mkdir(parents=True, exist_ok=True)
        working = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with self.filesystem.open_input_stream(self.path(key)) as source, working.open("wb") as file:
                while piece := source.read(PIECE):
                    file.write(piece)
            if working.stat().st_size != found.size:
                raise OSError(f"{working.stat().st_size} bytes arrived, of {found.size}")
            os.utime(working, ns=(found.seconds * 10**9,) * 2)
            working.replace(target)
        finally:
            working.unlink(missing_ok=True)
        return found

    def _tried(self, what: str, action: Callable[[], T], safe: str = "nothing was changed") -> T:
        for wait in (*WAITS, None):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                why = _hopeless(error)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if wait is None or why:
                    raise StoreError(f"{what} failed: {reason}; {safe}. {ADVICE[why]}") from error
                logger.warning("%s failed, another try in %g s: %s", what, wait, reason)
                time.sleep(wait)
        raise AssertionError


def _located(uri: str) -> tuple[fs.FileSystem, str]:
    written, options = split_options(uri)
    if written.startswith("s3://"):  # small files by one request in place of three
        options += ("&" if options else "?") + "allow_delayed_open=true"
    filesystem, path = fs.FileSystem.from_uri(written + options)
    return filesystem, path


def _found(info: fs.FileInfo) -> Found:
    return Found(int(info.size), int(info.mtime_ns // 10**9))


def _hopeless(error: OSError) -> str:
    """Which of ADVICE helps more than another try; empty for none."""
    if error.errno == errno.ENOSPC:
        return "room"
    return next((why for text, why in HOPELESS.items() if text in str(error)), "")


def in_parallel(what: str, sizes: list[int], action: Callable[[int], object]) -> None:
    """Does `action` for each number from 0 on, THREADS at a time, with a line for the log when it takes long.

    Args:
        what: first words of the line.
        sizes: bytes of each, for the line.
        action: its first exception is raised, and what has not begun by then is left.
    """
    if len(sizes) <= 1:
        for number in range(len(sizes)):
            action(number)
        return
    start = told = time.monotonic()
    done = 0
    with ThreadPoolExecutor(min(THREADS, len(sizes))) as pool:
        for number, _ in enumerate(pool.map(action, range(len(sizes)))):  # which leaves the rest after an exception
            done += sizes[number]
            now = time.monotonic()
            if now - start > TELL_AFTER and now - told > TELL_EVERY:
                told = now
                line = "%s: %d of %s, %.1f of %.1f MB"
                logger.info(line, what, number + 1, counted(len(sizes), "file"), done / 1e6, sum(sizes) / 1e6)
    if time.monotonic() - start > TELL_AFTER:
        seconds = time.monotonic() - start
        logger.info("%s: %s, %.1f MB took %.0f s", what, counted(len(sizes), "file"), done / 1e6, seconds)
