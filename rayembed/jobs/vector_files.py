"""Vectors of a store on disk, a .npy file a part. Without torch: workers that only read them start in a second."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayembed.data.copies import shown
from rayembed.data.mirror import all_here, here
from rayembed.data.storage import save_npy
from rayembed.data.store import Store


@dataclass(frozen=True)
class Vectors:
    """Vectors of a store, a .npy file a part."""

    folder: Path
    store: Store

    def part(self, index: int) -> NDArray[np.float32]:
        """Vectors [rows of the part, D], memory-mapped."""
        vectors: NDArray[np.float32] = np.load(here(self._file(index)), mmap_mode="r")
        return vectors

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Vectors [last - first, D] of rows `first` to `last` - 1, copied into memory, whichever parts they are in."""
        pieces = list(self.store.pieces(first, last))
        all_here(self._file(index) for index, _, _ in pieces)
        return np.concatenate([self.part(index)[start:stop] for index, start, stop in pieces])

    @cached_property
    def dimension(self) -> int:
        """D."""
        return int(self.part(0).shape[1])

    def all(self) -> NDArray[np.float32]:
        """All vectors [rows of the store, D] in memory: for queries, not for a corpus."""
        all_here(map(self._file, range(len(self.store.parts))))
        return np.concatenate([self.part(index) for index in range(len(self.store.parts))])

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors by row number, in the given order."""
        taken = np.empty((len(rows), self.dimension), np.float32)
        first_rows = np.array([part.first_row for part in self.store.parts])
        of_part = np.searchsorted(first_rows, rows, side="right") - 1
        parts = np.unique(of_part).tolist()
        all_here(map(self._file, parts))
        for index in parts:
            own = of_part == index
            taken[own] = self.part(index)[rows[own] - first_rows[index]]
        return taken

    def _file(self, index: int) -> Path:
        return self.folder / f"{part_name(index)}.npy"


def part_name(index: int) -> str:
    """Name of the vectors of one part, without its ending."""
    return f"part-{index:05d}"


def rows_of_parts(store: Store, first: int, last: int) -> str:
    """In words, for errors: the rows of parts `first` to `last` - 1."""
    end = store.parts[last - 1]
    return f"rows {store.parts[first].first_row} to {end.first_row + end.num_rows - 1} of {shown(store.folder)}"


def save_part(folder: Path, index: int, vectors: NDArray[np.float32]) -> None:
    """Writes the vectors of one part, whole or not at all."""
    save_npy(folder / f"{part_name(index)}.npy", vectors)
