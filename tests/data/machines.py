"""Machines with scratch folders of their own and one store, all in this process: a server takes longer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

from rayembed.data import copies, mirror
from rayembed.data.object_store import ObjectStore

URI = "s3://bucket/runs/one?region=x&scheme=http"


class Machines:
    """Machines with scratch folders of their own, and a store that is a folder of this one."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch, self._folder = patch, folder
        self.store = folder / "store"
        patch.setattr(ObjectStore, "open", lambda uri: ObjectStore(uri, fs.LocalFileSystem(), str(self.store)))

    def use(self, name: str, *, refreshed: bool = True) -> Path:
        """From here on this process is that machine, just started; its copy of the run folder."""
        self._patch.setenv("RAYEMBED_SCRATCH", str(self._folder / name))
        self._patch.setattr(copies, "_MIRRORS", {})
        root = copies.local(URI)
        time.sleep(0.15)  # what is younger may have been sent after a listing
        if refreshed:
            mirror.refresh(root)
        return root

    @contextmanager
    def away(self, name: str) -> Iterator[None]:
        """In this block this process is another machine, just started; then what it was before, which goes on."""
        with self._patch.context() as patch:
            patch.setenv("RAYEMBED_SCRATCH", str(self._folder / name))
            patch.setattr(copies, "_MIRRORS", {})
            yield

    def there(self) -> dict[str, str]:
        """What the store has."""
        files = [path for path in self.store.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.store)): path.read_text(errors="replace") for path in files}
