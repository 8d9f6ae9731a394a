"""A run folder on an object store: each machine works on a copy of its own, and the store holds the truth.

The jobs see local paths. `local` names the copy that belongs to a URI, `RAYEMBED_SCRATCH/FINGERPRINT/NAME` (default: a
folder of the user's in TMPDIR), and this process then knows that everything below it belongs to the store:

* A file goes to the store before it gets its name here (`send`, called where files get their names), so what lies here
  lies there too, and the file that marks a unit done is sent after what the unit wrote.
* A file is fetched where it is opened (`here`, `folder_here`), unless it is here in the version that the store has. Its
  local time is the store's, as by rsync, so equal size and time mean the same version, on every machine.
* `refresh`, at the beginning of a job, brings folders and small files here that jobs look at to see what is done, and
  removes what the store has not, or has otherwise. It leaves alone what is not below its folder: trials of a sweep have
  run folders in the same copy, and run at the same time.
* Object stores cannot rename a folder. `NAME.partial` lies under NAME there from the beginning, with the file
  `_PARTIAL`; `publish` writes `_SUCCESS` last. Without it the folder is unfinished, and is `NAME.partial` again on a
  machine that fetches it.
* Names that begin with a dot are of this machine alone.

Paths that belong to no store are left alone, and cost nothing.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rayembed.data.copies import FINISHED, LOCKS, PARTIAL, UNFINISHED, Mirror, any_mirror, local_names, mirror_of
from rayembed.data.object_store import Found, in_parallel

RECORDS = ("job.json", "store.json")  # without which nobody takes a folder for one that can be gone on with
LOOKED_AT = (".json", ".yaml", ".txt", ".html")  # endings of files that jobs look at to see what is done
OF_REPORTS = ("metrics.jsonl", "evaluations.jsonl", "per_query.jsonl")
NOT_LOOKED_AT = ("done", "tries", "audits", "checkpoints", "tensorboard")  # folders of many files
STRIPES = 64
MODEL_FILES = ("config.json", "adapter_config.json")
CACHE = "cache"  # whose unfinished folders may be another run's work
YOUNG_NS = 10**8  # a file that was here so long before a listing was asked for was sent before; clocks of disks lag


def here(path: Path) -> Path:
    """The path, when its file is here as the store has it; what the store has not stays as it is."""
    mirror = mirror_of(path)
    if mirror is not None:
        _fetch(mirror, path)
    return path


def all_here(paths: Iterable[Path]) -> None:
    """Brings files here, several at a time."""
    if any_mirror():
        asked = [(mirror, path) for path in paths if (mirror := mirror_of(path)) is not None]
        wanted = [(mirror, path) for mirror, path in asked if not (path in mirror.known and path.exists())]
        in_parallel("fetch files", [0] * len(wanted), lambda number: _fetch(*wanted[number]))


def folder_here(folder: Path, *, recursive: bool = True) -> Path:
    """The folder, when all files that the store has below it are here; an unfinished one in it ends in .partial."""
    mirror = mirror_of(folder)
    if mirror is not None:
        key = mirror.key(folder)
        found = local_names(folder, key, mirror.store.list(key, recursive=recursive))
        _fetch_all(mirror, found)
    return folder


def model_here(*values: object) -> None:
    """Fetches the folders of models that texts name, also in lists, dicts and JSON of experiments."""
    if any_mirror():
        for text in set(_texts(values)):
            mirror = mirror_of(Path(text))
            if mirror is not None and mirror.key(Path(text)):
                key = mirror.key(Path(text))
                if any(mirror.store.find(f"{key}/{name}") for name in MODEL_FILES):
                    folder_here(Path(text))


def names(folder: Path) -> set[str] | None:
    """Names of the files directly in a folder of the store; None where the folder is a plain one."""
    mirror = mirror_of(folder)
    if mirror is None:
        return None
    return {key.rsplit("/", 1)[-1] for key in mirror.store.list(mirror.key(folder), recursive=False)}


def is_there(path: Path) -> bool:
    """Whether there is a file, in the store or, of a plain path, here."""
    mirror = mirror_of(path)
    return path.exists() if mirror is None else mirror.store.find(mirror.key(path)) is not None


def send(path: Path, source: Path | None = None) -> None:
    """Sends a file that is about to get its name here, or has it.

    Args:
        path: its name.
        source: where it lies. None: under its name.
    """
    mirror = mirror_of(path)
    if mirror is not None:
        _begin(mirror, path)
        _send(mirror, path, source or path)


def send_folder(folder: Path, *, but: Sequence[str] = ()) -> None:
    """Sends the files below a folder that the store has not or has otherwise; unfinished folders in it are left out.

    Args:
        folder: what the store has and it has not stays there.
        but: names of folders that are left out.
    """
    mirror = mirror_of(folder)
    if mirror is None:
        return
    changed = []
    for path in _walk(folder, but, partial=False):
        if not mirror.unchanged(path):  # as far as this process knows
            found = mirror.store.find(mirror.key(path))
            if found is not None and mirror.same(path, found):
                mirror.note(path)
            else:
                changed.append(path)
    if changed:
        _begin(mirror, changed[0])
        _send_all(mirror, changed)


def send_whole(folder: Path) -> None:
    """Replaces a finished folder of the store by the one that is here, of which nothing is missing."""
    mirror = mirror_of(folder)
    if mirror is None:
        return
    reopen(folder)
    key, files = mirror.key(folder), list(_walk(folder))
    kept = {mirror.key(path) for path in files} | {f"{key}/{UNFINISHED}"}
    for other in mirror.store.list(key):
        if other not in kept:
            mirror.store.delete(other)
    _send_all(mirror, files)
    _finish(mirror, key)


def publish(working: Path, final: Path) -> None:
    """Sends what is here of a working folder and the store has not, then the mark that it is finished.

    Args:
        working: where it lies here; its name ends in .partial.
        final: the name that it gets after this.
    """
    mirror = mirror_of(final)
    if mirror is None:
        return
    key = mirror.key(final)
    _begin(mirror, working / UNFINISHED)
    there = mirror.store.list(key)
    other = [path for path in _walk(working) if not _is_there(mirror, path, there)]
    older = [path for path in other if mirror.unchanged(path)]  # fetched, and written on by another machine since
    _send_all(mirror, [path for path in other if path not in older])
    for path in older:
        mirror.forget(path)
        path.unlink()
    _finish(mirror, key)
    for path in [path for path in mirror.known if working in path.parents]:
        mirror.known[final / path.relative_to(working)] = mirror.known.pop(path)


def reopen(final: Path) -> None:
    """Makes a finished folder of the store an unfinished one."""
    mirror = mirror_of(final)
    if mirror is not None:
        key = mirror.key(final)
        mirror.store.put_mark(_below(key, UNFINISHED))
        mirror.store.delete(_below(key, FINISHED))
        mirror.begun.add(key)


def remove(path: Path) -> None:
    """Removes a file or a folder, here and in the store; that there is none is as good.

    A finished folder becomes an unfinished one without a record first, so that nobody finds half of it.

    Raises:
        ValueError: the path is all of a run folder on a store.
    """
    mirror = mirror_of(path)
    if mirror is not None:
        key = mirror.key(path)
        finished = mirror.store.find(_below(key, FINISHED)) is not None
        if not (finished and path.name.endswith(PARTIAL)):  # the working folder of what is to replace it
            if finished:
                reopen(path)
                for name in RECORDS:
                    mirror.store.delete(_below(key, name))
            if not key and not mirror.store.find(UNFINISHED):
                raise ValueError(f"{mirror.store.named('')} is a whole run folder, which is never deleted")
            mirror.store.delete_all(key)
            mirror.begun.discard(key)
        mirror.forget(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def count_up(path: Path) -> int:
    """How often this was called for a path before, on any machine that the path belongs to."""
    mirror = mirror_of(path)
    if mirror is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")
            return file.tell() - 1
    key = mirror.key(path)
    mirror.store.put_mark(f"{key}/{uuid.uuid4().hex}")
    return len(mirror.store.list(key, recursive=False)) - 1


def refresh(path: Path, *, alone: bool = True) -> None:
    """Makes a folder of a copy, or all of it, show what the store holds: folders, and small files that jobs look at.

    Args:
        path: the run folder, or one in it that is not written as a whole: of a round, of a trial, the cache.
        alone: whether no other command of this machine is writing there. False: what is here stays as it is.
    """
    mirror = mirror_of(path)
    if mirror is None:
        return
    asked, key = time.time_ns(), mirror.key(path)
    mirror.begun -= {own for own in mirror.begun if not key or own == key or own.startswith(f"{key}/")}
    found = local_names(path, key, mirror.store.list(key))
    for root in (path, path.with_name(path.name + PARTIAL)) if alone else ():
        mirror.forget(root)
        emptied = _tidy(mirror, root, found, asked)
        _remove_empty(mirror, root, {folder for file in found for folder in file.parents}, emptied)
    for folder in {file.parent for file in found}:
        folder.mkdir(parents=True, exist_ok=True)
    looked_at = [file for file in found if _looked_at(file.relative_to(mirror.root.parent))]
    _fetch_all(mirror, {file: found[file] for file in looked_at if alone or not file.exists()})


def tidy(folder: Path) -> None:
    """Removes what is here of a folder that workers write and the store has not, or has otherwise."""
    mirror = mirror_of(folder)
    if mirror is not None:
        asked, key = time.time_ns(), mirror.key(folder)
        _tidy(mirror, folder, local_names(folder, key, mirror.store.list(key)), asked, at_work=True)


def _tidy(mirror: Mirror, folder: Path, found: Mapping[Path, Found], asked: int, *, at_work: bool = False) -> set[Path]:
    """Removes files that are not those of the store, and gives the folders that they were in.

    Args:
        mirror: of the folder.
        folder: here.
        found: what the store has.
        asked: when it was listed, ns.
        at_work: others may be writing unfinished folders in it, as they may in every cache.
    """
    emptied, by_key = set[Path](), {mirror.key(file): own for file, own in found.items()}
    for file in _walk(folder):
        own = found.get(file)
        if own is None and _in_cache(mirror, file.parent):  # its folder may have got its final name after the listing
            own = by_key.get(mirror.key(file))
        if own is not None and mirror.same(file, own):
            mirror.note(file)
            continue
        others = (at_work or _in_cache(mirror, file.parent)) and any(
            part.endswith(PARTIAL) for part in file.relative_to(folder).parts[:-1]
        )
        try:
            if not others and file.stat().st_ctime_ns < asked - YOUNG_NS:
                mirror.known.pop(file, None)
                file.unlink()
                emptied.update(file.parents)
        except FileNotFoundError:  # another process of this machine was quicker
            continue
    return emptied


def _in_cache(mirror: Mirror, folder: Path) -> bool:
    """Whether others may be writing there, another run or another trial."""
    return mirror.shared or CACHE in folder.relative_to(mirror.root.parent).parts[1:]


def _is_there(mirror: Mirror, path: Path, there: Mapping[str, Found]) -> bool:
    """Whether a listing has the file as it is here."""
    found = there.get(mirror.key(path))
    return found is not None and mirror.same(path, found)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        if value.startswith("{"):
            with suppress(ValueError):  # no JSON
                yield from _texts(json.loads(value))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _below(key: str, name: str) -> str:
    return f"{key}/{name}" if key else name


def _begin(mirror: Mirror, path: Path) -> None:
    """Marks the working folders that a path is in as unfinished, once."""
    for folder in path.parents:
        if folder == mirror.root.parent:
            break
        if folder.name.endswith(PARTIAL) and (key := mirror.key(folder)) not in mirror.begun:
            mirror.store.put_mark(_below(key, UNFINISHED))
            mirror.begun.add(key)


def _finish(mirror: Mirror, key: str) -> None:
    mirror.store.put_mark(_below(key, FINISHED))
    mirror.store.delete(_below(key, UNFINISHED))
    mirror.begun.discard(key)


def _send(mirror: Mirror, path: Path, source: Path) -> None:
    before = source.stat()
    found = mirror.store.put(mirror.key(path), source)
    after = source.stat()
    if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):  # nobody wrote on meanwhile
        os.utime(source, ns=(found.seconds * 10**9,) * 2)
        mirror.known[path] = (found.size, found.seconds * 10**9)


def _send_all(mirror: Mirror, paths: Sequence[Path]) -> None:
    sizes = [path.stat().st_size for path in paths]
    in_parallel(f"send to {mirror.store.named('')}", sizes, lambda number: _send(mirror, paths[number], paths[number]))


def _fetch(mirror: Mirror, path: Path) -> None:
    """Brings a file here; processes of this machine that want the same one wait for the first."""
    if path in mirror.known and path.exists():
        return
    key = mirror.key(path)
    with _locked(mirror, key):
        found = mirror.store.find(key) if path.exists() else None
        if found is None or not mirror.same(path, found):
            if path.exists() and found is None:
                return  # being written here, and not sent yet
            if mirror.store.get(key, path) is None:
                return
        mirror.note(path)


def _fetch_all(mirror: Mirror, found: Mapping[Path, Found]) -> None:
    wanted = []
    for path, own in found.items():
        if mirror.same(path, own):
            mirror.note(path)
        else:
            mirror.known.pop(path, None)
            wanted.append(path)
    sizes = [found[path].size for path in wanted]
    in_parallel(f"fetch from {mirror.store.named('')}", sizes, lambda number: _fetch(mirror, wanted[number]))


@contextmanager
def _locked(mirror: Mirror, key: str) -> Iterator[None]:
    folder = mirror.root.parent / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    stripe = int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "big") % STRIPES
    with (folder / str(stripe)).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _walk(folder: Path, but: Sequence[str] = (), *, partial: bool = True) -> Iterator[Path]:
    """Files below a folder, hidden ones left out, sorted."""
    for parent, folders, files in os.walk(folder):
        kept = [name for name in folders if not name.startswith(".") and name not in but]
        folders[:] = sorted(name for name in kept if partial or not name.endswith(PARTIAL))
        yield from (Path(parent) / name for name in sorted(files) if not name.startswith("."))


def _remove_empty(mirror: Mirror, root: Path, kept: set[Path], emptied: set[Path]) -> None:
    """Removes folders without files; of a cache those that were emptied, because others may be about to fill theirs."""
    for parent, _, _ in sorted(os.walk(root), reverse=True):
        folder = Path(parent)
        if folder not in kept and folder != root and (folder in emptied or not _in_cache(mirror, folder)):
            with suppress(OSError):  # it has files
                folder.rmdir()


def _looked_at(path: Path) -> bool:
    if any(part in NOT_LOOKED_AT for part in path.parts[1:-1]) or path.name.endswith(".ids.json"):
        return False
    return path.suffix in LOOKED_AT or path.name in OF_REPORTS
