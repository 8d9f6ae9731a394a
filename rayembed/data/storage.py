"""Paths on any filesystem of pyarrow.fs, and local files and folders that exist only when they are whole.

Of a run folder on an object store, what gets its name here is there as well (rayembed/data/mirror.py).

A path is local (absolute or relative) or a URI (`s3://bucket/key`, `gs://...`, `file:///...`), with options after `?`
as pyarrow.fs takes them. In URIs only `*` and `**` are wildcards, because `?` begins the options.
"""

import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from rayembed.config.uris import public_name, split_options
from rayembed.data import mirror
from rayembed.data.copies import is_mirrored, shown, with_names

SUFFIXES = (".jsonl", ".json", ".parquet")
READ_BYTES = 4 << 20  # a request to an object store costs tens of milliseconds, however little it fetches


def expand(path: str) -> list[str]:
    """Files that a path names, sorted, so that the order of a listing never matters.

    A file is itself. Of a folder, the files with a known suffix directly in it count, names that begin with `.` or `_`
    left out; of a folder with part-* files (written by a job) only those. A glob matches files with a known suffix.

    Raises:
        FileNotFoundError: nothing matches.
    """
    if "://" not in path and is_mirrored(path):
        mirror.folder_here(Path(path), recursive=False)
    info = _info(path)
    if info.type == fs.FileType.File:
        return [path]
    if info.type == fs.FileType.Directory:
        found = _list(path, ["*"])
        found = [name for name in found if _name(name).startswith("part-")] or found
    else:
        base, pattern = _glob_base(path)
        found = _list(base, pattern) if pattern else []
    if not found:
        raise FileNotFoundError(
            f"{public_name(path)!r} names no file; allowed are a file, a folder or a glob of {', '.join(SUFFIXES)}"
        )
    return found


def open_input(path: str) -> BinaryIO:
    """Open a file for reading, with seek."""
    filesystem, inner = _locate(path)
    return io.BufferedReader(cast(io.RawIOBase, filesystem.open_input_file(inner)), READ_BYTES)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    return bool(_info(path).type != fs.FileType.NotFound)


def is_folder(path: str) -> bool:
    """Whether there is a folder."""
    return bool(_info(path).type == fs.FileType.Directory)


def stamp(path: str) -> str:
    """Size in bytes and time of change of a file: equal stamps mean that it was not written since."""
    info = _info(path)
    return "missing" if info.type == fs.FileType.NotFound else f"{info.size}-{info.mtime_ns}"


def join(folder: str, name: str) -> str:
    """Path of a file in a folder; options of a URI stay at its end."""
    written, options = split_options(folder)
    return f"{written.rstrip('/')}/{name}{options}"


def identity(path: str) -> str:
    """The same text for every way to write a path; keys of a URI have no part in it."""
    return public_name(path) if "://" in path else shown(os.path.abspath(os.path.expanduser(path)))


def fingerprint(value: object) -> str:
    """16 hex digits that stand for a JSON value; the order of keys does not matter, nor where copies of a store lie."""
    canonical = with_names(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a local file so that it is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as working, working.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_changed(path: Path, data: bytes) -> None:
    """`write_atomic`, unless the file has these contents: on an object store each writing is a request."""
    if not holds(path, data):
        write_atomic(path, data)


def holds(path: Path, data: bytes) -> bool:
    """Whether a local file has these contents."""
    return path.is_file() and path.read_bytes() == data


def save_npy(path: Path, values: NDArray[Any]) -> None:
    """Write an array as a local .npy file so that it is there in full or not at all."""
    with whole_file(path) as working, working.open("wb") as file:
        np.save(file, values, allow_pickle=False)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that gets its final name when the block ends well, and is removed when it does not.

    Its name has the host and the process in it: two that write the same file, because Ray gave a unit to another worker
    while the first was only slow, do not write into each other's.
    """
    working = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield working
        mirror.send(path, working)
        working.replace(path)
    finally:
        working.unlink(missing_ok=True)


def working_folder(final: Path) -> Path:
    """Where a folder is written before it is whole: beside its final name."""
    return final.with_name(final.name + ".partial")


def publish_folder(final: Path) -> None:
    """Give the working folder its final name.

    Raises:
        FileExistsError: the final folder is there already.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already; remove it, or use --overwrite, to write it again")
    mirror.publish(working_folder(final), final)
    os.rename(working_folder(final), final)


@contextmanager
def whole_folder(final: Path, *, fresh: bool = False) -> Iterator[Path]:
    """A folder to write in that gets its final name when the block ends well.

    On an exception it stays beside the final name, and the next call finds what it holds; `fresh` empties it first.

    Raises:
        FileExistsError: the final folder is there already.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already; remove it, or use --overwrite, to write it again")
    working = working_folder(final)
    if fresh:
        shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True, exist_ok=True)
    yield working
    publish_folder(final)


def _locate(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path, and the path inside it."""
    if "://" in path:
        filesystem, inner = fs.FileSystem.from_uri(path)
        return filesystem, inner
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def _info(path: str) -> fs.FileInfo:
    filesystem, inner = _locate(path)
    return filesystem.get_file_info(inner)


def _name(path: str) -> str:
    return split_options(path)[0].rsplit("/", 1)[-1]


def _glob_base(path: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard and the pattern's parts below it; no parts if there is no wildcard."""
    written, options = split_options(path)
    parts = written.split("/")
    wild = "*" if "://" in path else "*?["
    first = next((i for i, part in enumerate(parts) if any(c in part for c in wild)), len(parts))
    base = "/".join(parts[:first]) or ("/" if written.startswith("/") else "")
    return base + options, parts[first:]


def _list(base: str, pattern: list[str]) -> list[str]:
    """Files below a folder whose relative path matches, written as the folder is, sorted."""
    written, options = split_options(base)
    filesystem, inner = _locate(base or ".")
    inner = inner.rstrip("/")
    selector = fs.FileSelector(inner or "/", allow_not_found=True, recursive=len(pattern) > 1 or pattern == ["**"])
    found = []
    for info in filesystem.get_file_info(selector):
        relative = info.path[len(inner) :].lstrip("/")
        known = info.base_name.endswith(SUFFIXES) and not info.base_name.startswith((".", "_"))
        if info.type == fs.FileType.File and known and _matches(relative.split("/"), pattern):
            below = quote(relative) if "://" in base else relative
            found.append((f"{written.rstrip('/')}/{below}" if written else below) + options)
    return sorted(found)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a glob, part by part; ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(_matches(parts[i:], rest) for i in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
