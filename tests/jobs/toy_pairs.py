"""A source of pairs in a file, which kills its process on wish; and a teacher whose bits tell how it was batched."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rayembed.jobs.pairs import PairSource

Pairs = list[tuple[str, str]]


class FilePairs:
    """Reads parts from FILE; a process that is not its first kills itself at the part that FILE.deadly names."""

    def __init__(self, *, file: str, driver: int) -> None:
        self._file, self._driver = Path(file), driver

    def pairs(self, part: int) -> Pairs:
        deadly = self._file.with_suffix(".deadly")
        if os.getpid() != self._driver and deadly.exists() and deadly.read_text() == str(part):
            os.kill(os.getpid(), signal.SIGKILL)
        return [(query, passage) for query, passage in json.loads(self._file.read_text())[part]]


def write_source(file: Path, parts: Sequence[Pairs]) -> PairSource:
    """A source of these parts."""
    file.write_text(json.dumps(parts))
    arguments = {"file": str(file), "driver": os.getpid()}
    return PairSource("tests.jobs.toy_pairs:FilePairs", arguments, len(parts), tuple(map(len, parts)))


def random_parts(seed: int, parts: int, pairs: int) -> list[Pairs]:
    """Parts of pairs of 8 queries and 12 passages of one to nine words: many come up again."""
    rng = np.random.default_rng(seed)
    words = ["baba", "didi", "kuku", "lolo", "momo"]
    texts = [[" ".join(rng.choice(words, size=rng.integers(1, 10))) for _ in range(count)] for count in (8, 12)]
    return [
        [
            (texts[0][q], texts[1][p])
            for q, p in zip(rng.integers(8, size=pairs), rng.integers(12, size=pairs), strict=True)
        ]
        for _ in range(parts)
    ]


class BatchTeacher:
    """Scores are lengths, and thousandths of the pair's place in the call: another batch, another score."""

    def __init__(self) -> None:
        self.calls: list[Pairs] = []

    def score(self, pairs: Pairs, *, tokens_per_batch: int, dtype: torch.dtype) -> NDArray[np.float32]:
        self.calls.append(list(pairs))
        lengths = np.array([len(query) * 100 + len(passage) for query, passage in pairs])
        return (lengths + np.arange(len(pairs)) / 1000).astype(np.float32)
