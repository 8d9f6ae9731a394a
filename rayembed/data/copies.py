"""Which local paths are copies of what lies on an object store, and where; see rayembed/data/mirror.py."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rayembed.config.uris import public_name, split_options
from rayembed.data.object_store import Found, ObjectStore

SCRATCH = "RAYEMBED_SCRATCH"
PARTIAL = ".partial"
UNFINISHED, FINISHED = "_PARTIAL", "_SUCCESS"
SHARED = "shared"
LOCKS = ".locks"


@dataclass
class Mirror:
    """A folder of a store and its copy on this machine."""

    root: Path
    store: ObjectStore

    known: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Size and time in ns of local files that are as the store has them."""

    shared: bool = False
    """A cache that other runs may be writing to."""

    begun: set[str] = field(default_factory=set)
    """Keys of folders that the store knows as unfinished."""

    def key(self, path: Path) -> str:
        """Where a local path lies in the store."""
        parts = path.relative_to(self.root.parent).parts[1:]
        return "/".join(part.removesuffix(PARTIAL) for part in parts)

    def same(self, path: Path, found: Found) -> bool:
        """Whether the local file is what the store has."""
        try:
            own = path.stat()
        except FileNotFoundError:
            return False
        return (own.st_size, own.st_mtime_ns // 10**9) == (found.size, found.seconds)

    def note(self, path: Path) -> None:
        """Remembers that the local file is what the store has."""
        own = path.stat()
        self.known[path] = (own.st_size, own.st_mtime_ns)

    def unchanged(self, path: Path) -> bool:
        """Whether the local file is as it was noted."""
        own = path.stat()
        return self.known.get(path) == (own.st_size, own.st_mtime_ns)

    def forget(self, folder: Path) -> None:
        """Takes nothing below a folder for known."""
        for path in [path for path in self.known if path == folder or folder in path.parents]:
            del self.known[path]


_MIRRORS: dict[str, Mirror] = {}


def local(uri: str, *, shared: bool = False) -> Path:
    """The copy on this machine of a folder on an object store; everything below it belongs to the store from now on.

    Args:
        uri: without keys.
        shared: a cache that other runs may be writing to.

    Raises:
        PermissionError: the scratch folder is another user's.
    """
    for mirror in _MIRRORS.values():
        if mirror.store.uri == uri:
            return mirror.root
    folder = _scratch() / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    root = folder / public_name(uri).rstrip("/").rsplit("/", 1)[-1]
    _MIRRORS[f"{folder}{os.sep}"] = Mirror(root, ObjectStore.open(uri), shared=shared)
    return root


def mirror_of(path: Path) -> Mirror | None:
    """What a path belongs to; None: no store has a part in it."""
    text = str(path)
    for folder, mirror in _MIRRORS.items():
        if text.startswith(folder):
            first, *below = path.parts[len(mirror.root.parts) - 1 :]
            ours = first.removesuffix(PARTIAL) == mirror.root.name
            return mirror if ours and not any(part.startswith(".") for part in below) else None
    return None


def any_mirror() -> bool:
    """Whether this process has a copy of anything."""
    return bool(_MIRRORS)


def is_mirrored(path: Path | str) -> bool:
    """Whether a path is a copy of what lies on an object store."""
    return mirror_of(Path(path)) is not None


def lock_of(path: Path) -> Path | None:
    """What the command at work in the copy of a run folder holds; None: of a folder in it, a shared cache, no copy."""
    mirror = mirror_of(path)
    return mirror.root.parent / LOCKS / "at-work" if mirror and path == mirror.root and not mirror.shared else None


def shown(path: Path | str) -> str:
    """A path for people: of a copy, the place on the store."""
    mirror = mirror_of(Path(path))
    return str(path) if mirror is None else mirror.store.named(mirror.key(Path(path)))


def with_names(text: str) -> str:
    """A text with the places on the store where it has paths of copies."""
    for mirror in _MIRRORS.values():
        text = text.replace(str(mirror.root), mirror.store.named(""))
    return text


def uri_of(path: str) -> str:
    """The URI of what a path is a copy of, with its options; any other text as it is."""
    mirror = mirror_of(Path(path))
    if mirror is None:
        return path
    written, options = split_options(mirror.store.uri)
    key = mirror.key(Path(path))
    return f"{written}/{quote(key)}{options}" if key else mirror.store.uri


def place_of(path: Path) -> tuple[Any, str] | None:
    """Filesystem of pyarrow.fs and the path there of a copy; None where the path is a plain one."""
    mirror = mirror_of(path)
    return None if mirror is None else (mirror.store.filesystem, mirror.store.path(mirror.key(path)))


def registered() -> list[list[str]]:
    """The copies of this process, for others: path here, URI, and SHARED where other runs may be writing."""
    return [[str(own.root), own.store.uri, *([SHARED] if own.shared else [])] for own in _MIRRORS.values()]


def as_here(value: Any, theirs: Iterable[Sequence[str]]) -> Any:  # noqa: ANN401 - JSON
    """JSON of another machine with its copies' paths as they are on this one.

    Args:
        value: texts may hold paths anywhere.
        theirs: what `registered` gave there.
    """
    moved = {path: str(local(uri, shared=SHARED in kind)) for path, uri, *kind in theirs}
    return _replaced(value, {old: new for old, new in moved.items() if old != new})


def local_names(folder: Path, key: str, listed: Mapping[str, Found]) -> dict[Path, Found]:
    """Where files of a store lie below a local folder: in what is unfinished, under a name with .partial.

    Args:
        folder: the copy of `key`.
        key: of a folder of the store.
        listed: files below it, by their keys.
    """
    marks = {UNFINISHED: set[str](), FINISHED: set[str]()}
    for name in listed:
        parent, _, last = name.rpartition("/")
        if last in marks:
            marks[last].add(parent)
    unfinished = marks[UNFINISHED] - marks[FINISHED]
    place_of_key = {key: folder}
    if not key and "" in unfinished:
        place_of_key[key] = folder.with_name(folder.name + PARTIAL)

    def place(name: str) -> Path:
        if name not in place_of_key:
            parent, _, last = name.rpartition("/")
            place_of_key[name] = place(parent) / (last + PARTIAL if name in unfinished else last)
        return place_of_key[name]

    found = {}
    for name, own in listed.items():
        parent, _, last = name.rpartition("/")
        if last not in marks:
            found[place(parent) / last] = own
    return found


def _scratch() -> Path:
    named = os.environ.get(SCRATCH)
    path = Path(named) if named else Path(tempfile.gettempdir()) / f"rayembed-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not named and path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} is another user's; set {SCRATCH} to a folder of your own")
    return path.resolve()


def _replaced(value: Any, moved: Mapping[str, str]) -> Any:  # noqa: ANN401 - JSON
    if not moved:
        return value
    if isinstance(value, str):
        for old, new in moved.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {key: _replaced(item, moved) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, moved) for item in value]
    return value
