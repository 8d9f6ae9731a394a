"""What the passes of mining leave on disk for each part of the training rows: small arrays, a file a part."""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rayembed.data.mirror import here
from rayembed.data.storage import write_atomic


@dataclass(frozen=True)
class _Arrays:
    """Arrays of one part, in one file of a folder."""

    @classmethod
    def _path(cls, folder: Path, part: int) -> Path:
        return folder / f"{cls.__name__.lower()}-{part:05d}.npz"

    def save(self, folder: Path, part: int) -> None:
        """Writes the file whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        write_atomic(self._path(folder, part), buffer.getvalue())

    @classmethod
    def load(cls, folder: Path, part: int) -> Self:
        """Reads what `save` wrote."""
        with np.load(here(cls._path(folder, part))) as file:
            arrays: dict[str, NDArray[Any]] = dict(file)
        return cls(**arrays)


@dataclass(frozen=True)
class _Passages(_Arrays):
    """Passages of R training rows, of each row by rank."""

    offsets: NDArray[np.int64]
    """[R + 1]: the passages of row i are at offsets[i] to offsets[i + 1] - 1."""

    rows: NDArray[np.int64]
    """In the corpus."""

    ranks: NDArray[np.int64]
    """From 0; -1: drawn at random to fill up."""

    scores: NDArray[np.float32]
    """By the miner."""

    def of(self, row: int) -> slice:
        """Where the passages of a row are."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))


@dataclass(frozen=True)
class Pools(_Passages):
    """Candidates that the filters left."""

    order: NDArray[np.int64]
    """Places of a row's candidates, counted from its offset, in the order in which they are drawn."""

    positive_offsets: NDArray[np.int64]
    """[R + 1], of positive_scores."""

    positive_scores: NDArray[np.float32]
    """Of the row's own positives; NaN: unknown."""

    positive: NDArray[np.float32]
    """[R]: the positives' score that margins are measured from; NaN: unknown."""

    ceiling: NDArray[np.float32]
    """[R]: score of the last passage before the window; infinite: the window begins with the first rank."""

    dropped: NDArray[np.int64]
    """[R, filters]: how many candidates each filter dropped, in the order of the filters."""

    def positives_of(self, row: int) -> list[float | None]:
        """Scores of a row's positives; None: unknown."""
        own = self.positive_scores[self.positive_offsets[row] : self.positive_offsets[row + 1]]
        return [known(score) for score in own]


@dataclass(frozen=True)
class Judged(_Arrays):
    """What the teacher says of a part's pools."""

    scores: NDArray[np.float32]
    """Of each candidate; NaN: not judged."""

    bounds: NDArray[np.float32]
    """[R]: a candidate of the row that scores above this is dropped."""

    def allowed(self, places: slice, row: int) -> NDArray[np.bool_]:
        """Which candidates of a row may be negatives: judged, and not above the bound."""
        own: NDArray[np.bool_] = self.scores[places] <= self.bounds[row]
        return own


@dataclass(frozen=True)
class Chosen(_Passages):
    """Negatives; those that fill up stand last."""

    dropped: NDArray[np.int64]
    """[R, 3]: candidates of the pool that were passed over for each of choice.LATE."""


def known(score: float) -> float | None:
    """A score as JSON has it: None for NaN."""
    return None if np.isnan(score) else float(score)
