"""The cache of one teacher's scores: sorted runs of 128-bit keys of pairs, memory-mapped, searched as one.

A key stands for a pair: two of a billion pairs have the same one with a chance of 1 in 10^21. A run is a folder with
keys.npy [2, N] uint64 (upper and lower half, sorted) and scores.npy [N] float32: 20 bytes a pair. What is published
stays, and where two runs hold a pair the older one counts, so a score never changes.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayembed.data.mirror import all_here, folder_here, here
from rayembed.data.storage import publish_folder, whole_folder, working_folder
from rayembed.data.store import SeenHashes, chunks

RUNS, FILES = "runs", ("keys.npy", "scores.npy")
PAIRS_MERGED_AT_ONCE = 1 << 20
PIECES_MERGED_AT_ONCE = 64
Pairs = Sequence[tuple[str, str]]
Keys = NDArray[np.uint64]  # [2, N], upper and lower half
Scores = NDArray[np.float32]


def pair_keys(pairs: Pairs) -> Keys:
    """[2, N] keys of N (query, passage) pairs; the query's length goes in, so that no other pair joins to the same."""
    digests = bytearray()
    of_query: dict[str, hashlib.blake2b] = {}  # a query has many passages, and is hashed once
    for query, passage in pairs:
        if query not in of_query:
            text = query.encode()
            of_query[query] = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=16)
        digest = of_query[query].copy()
        digest.update(passage.encode())
        digests += digest.digest()
    return np.ascontiguousarray(np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64).reshape(-1, 2).T)


class SeenKeys:
    """Keys met so far, 16 bytes each.

    The halves are kept apart: a new key counts as met only if both of its halves come from other keys, which is as
    likely as two pairs with the same key.
    """

    def __init__(self) -> None:
        self._halves = (SeenHashes(), SeenHashes())

    def add(self, keys: Keys) -> NDArray[np.bool_]:
        """Whether each was met before, in an earlier call or earlier in this one; then count all as met."""
        upper, lower = (seen.add(half) for seen, half in zip(self._halves, keys, strict=True))
        return upper & lower


@dataclass(frozen=True)
class Run:
    """Scores of some pairs, sorted by key."""

    keys: Keys
    scores: Scores

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Maps what `write_run` or `merge_runs` wrote."""
        return cls(*(np.load(here(folder / name), mmap_mode="r") for name in FILES))

    def find(self, wanted: Keys) -> NDArray[np.int64]:
        """Place of each key, -1 where it is absent; equal upper halves are told apart by the lower ones."""
        upper, lower = self.keys
        at = np.searchsorted(upper, wanted[0], side="left")
        end = np.searchsorted(upper, wanted[0], side="right")
        found = np.full(wanted.shape[1], -1, np.int64)
        pending = np.flatnonzero(at < end)
        while pending.size:
            hit = lower[at[pending]] == wanted[1][pending]
            found[pending[hit]] = at[pending[hit]]
            pending = pending[~hit]
            at[pending] += 1
            pending = pending[at[pending] < end[pending]]
        return found


class PairScores:
    """The scores that one teacher has given so far, as they are when this is made; any process may read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs = [Run.open(path) for path in _runs(folder)]

    def lookup(self, pairs: Pairs) -> Scores:
        """Scores [N] of N (query, passage) pairs; NaN where a pair was not scored."""
        return self.of_keys(pair_keys(pairs))

    def of_keys(self, keys: Keys) -> Scores:
        """Scores [N] of N pairs by their keys [2, N]; NaN where a pair was not scored."""
        scores = np.full(keys.shape[1], np.nan, np.float32)
        for run in self._runs:
            pending = np.flatnonzero(np.isnan(scores))
            found = run.find(keys[:, pending])
            scores[pending[found >= 0]] = run.scores[found[found >= 0]]
        return scores


def write_run(folder: Path, keys: Keys, scores: Scores) -> None:
    """Writes scores of pairs, in any order; the folder is there whole or not at all."""
    order = np.lexsort((keys[1], keys[0]))
    with whole_folder(folder, fresh=True) as working:
        np.save(working / "keys.npy", np.ascontiguousarray(keys[:, order]))
        np.save(working / "scores.npy", scores[order].astype(np.float32))


def publish(pieces: Sequence[Path], cache: Path, name: str) -> None:
    """Merges runs of different pairs into one that every later `PairScores` of the cache reads."""
    merged, final = cache / f".{name}.merged", cache / RUNS / f"{len(_runs(cache)):05d}-{name}"
    shutil.rmtree(merged, ignore_errors=True)  # of a call that was killed before it could rename it
    all_here(piece / name for piece in pieces for name in FILES)
    merge_runs(pieces, merged)
    (cache / RUNS).mkdir(exist_ok=True)
    shutil.rmtree(working_folder(final), ignore_errors=True)
    os.rename(merged, working_folder(final))
    publish_folder(final)


def _runs(cache: Path) -> list[Path]:
    """Folders of the runs that were published, the oldest first."""
    folder_here(cache / RUNS)
    return [path for path in sorted((cache / RUNS).glob("*")) if path.suffix != ".partial"]


def merge_runs(pieces: Sequence[Path], folder: Path) -> None:
    """One sorted run of several; many are merged in groups first, since each is opened for each slice of the result.

    Memory: some 60 bytes for each of PAIRS_MERGED_AT_ONCE pairs, and 8 bytes a piece of a group and slice.
    """
    groups = folder.with_name(f"{folder.name}.groups")
    shutil.rmtree(groups, ignore_errors=True)  # of a call that was killed
    for level in count():
        if len(pieces) <= PIECES_MERGED_AT_ONCE:
            break
        grouped = list(chunks(pieces, PIECES_MERGED_AT_ONCE))
        pieces = [groups / f"{level}-{number:05d}" for number in range(len(grouped))]
        for own, group in zip(grouped, pieces, strict=True):
            _merge(own, group)
    _merge(pieces, folder)
    shutil.rmtree(groups, ignore_errors=True)


def _merge(pieces: Sequence[Path], folder: Path) -> None:
    """Keys are spread evenly, so slices of them are merged one after the other."""
    total = sum(Run.open(piece).scores.size for piece in pieces)
    slices = -(-max(total, 1) // PAIRS_MERGED_AT_ONCE)
    bounds = np.array([i * 2**64 // slices for i in range(1, slices)], np.uint64)
    cuts = []
    for piece in pieces:
        upper = Run.open(piece).keys[0]
        cuts.append([0, *np.searchsorted(upper, bounds).tolist(), len(upper)])
    with whole_folder(folder, fresh=True) as working:
        keys = np.lib.format.open_memmap(working / "keys.npy", "w+", np.uint64, (2, total))
        scores = np.lib.format.open_memmap(working / "scores.npy", "w+", np.float32, (total,))
        start = 0
        for of_slice in range(slices):
            found = list(_slices(pieces, cuts, of_slice))
            own, values = np.concatenate([f[0] for f in found], axis=1), np.concatenate([f[1] for f in found])
            order, end = np.lexsort((own[1], own[0])), start + len(values)
            keys[:, start:end], scores[start:end] = own[:, order], values[order]
            start = end
        keys.flush()
        scores.flush()


def _slices(pieces: Sequence[Path], cuts: list[list[int]], number: int) -> Iterator[tuple[Keys, Scores]]:
    """Each piece's share of a slice, read and closed again: there may be more pieces than files may be open."""
    for piece, cut in zip(pieces, cuts, strict=True):
        run, place = Run.open(piece), slice(cut[number], cut[number + 1])
        yield np.array(run.keys[:, place]), np.array(run.scores[place])
