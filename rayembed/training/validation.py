"""Evaluation on the dev split between steps, by the training workers and with the model as it lies in its engine.

Texts are read in the batches of the job `evaluate` (blocks of the store, sorted by length, padded), and workers take
turns at these batches. So vectors are those of that job, bit by bit in the same arithmetic, and figures depend on no
number of workers. A worker holds the vectors of the queries and of one piece of its passages, and searches that piece
before it encodes the next one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rayembed.config import Experiment
from rayembed.data.mirror import here
from rayembed.data.tokens import TextTokens
from rayembed.models.chunks import pad_chunks, padded_groups
from rayembed.models.encoding import resolve_tokens_per_batch
from rayembed.models.trained import build_tokenizer
from rayembed.training.gather import largest_of_workers

if TYPE_CHECKING:
    from rayembed.search.merge import Top
    from rayembed.training.engine import Engine

FACTS = "dev.json"
PIECE = 65536  # passages whose vectors a worker holds at once
AT_ONCE = 9  # rankings of pieces that a worker holds at once: search.merge.SHARDS_AT_ONCE, and the best before

Floats = NDArray[np.float32]


def held_bytes(num_queries: int, num_passages: int, *, dimension: int, k: int, workers: int) -> int:
    """What an evaluation holds on a worker beside the model: vectors in float32, and k passages a query.

    Args:
        num_queries: Q.
        num_passages: of all workers.
        dimension: D.
        k: passages a query.
        workers: that share the passages.
    """
    piece = min(PIECE, -(-num_passages // workers))
    return 4 * dimension * (num_queries + piece) + 12 * k * num_queries * (AT_ONCE + workers)


class DevSplit:
    """Texts and judgements that the job has laid down in a folder."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads(here(folder / FACTS).read_text())
        self.name = folder.name
        """By its contents and how they are read."""

        self.queries, self.passages = (TextTokens(folder / side) for side in ("query", "passage"))
        self.judgements: dict[str, dict[str, int]] = facts["judgements"]
        self.block_rows: dict[str, int] = facts["block_rows"]
        self.words: str = facts["words"]
        self.counts = {name: int(facts[name]) for name in ("queries", "passages", "corpus")}


@dataclass(frozen=True)
class Place:
    """A worker among the workers."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One worker's part of an evaluation; all workers do it at the same steps."""

    engine: "Engine"
    split: DevSplit
    k: int
    """Passages a query that metrics look at."""

    tokens_per_batch: int
    pad_token: int
    padding_side: str
    place: Place

    @classmethod
    def of(cls, experiment: Experiment, engine: "Engine", folder: Path, place: Place) -> "Validation":
        """By the experiment's settings, of the dev split in a folder."""
        assert experiment.train is not None
        tokenizer = build_tokenizer(experiment)
        return cls(
            engine=engine,
            split=DevSplit(folder),
            k=int(experiment.train.metric_for_best_model.split("@")[1]),
            tokens_per_batch=resolve_tokens_per_batch(experiment.encode.tokens_per_batch, place.device),
            pad_token=int(tokenizer.pad_token_id),
            padding_side=tokenizer.padding_side,
            place=place,
        )

    def figures(self) -> dict[str, float]:
        """Every metric at `k`, the same on all workers."""
        training = [module for module in self.engine.module.modules() if module.training]
        self.engine.module.eval()
        try:
            with torch.no_grad():
                return self._figures()
        finally:
            for module in training:
                module.training = True

    def _figures(self) -> dict[str, float]:
        from rayembed.evaluation.ranking import METRICS, evaluate_rankings

        queries = self._all_queries()
        best = self._best_of_all(self._best_of_own(queries), len(queries))
        names = [f"{name}@{self.k}" for name in METRICS]
        found = torch.zeros(len(names), dtype=torch.float64)
        if best is not None:
            rows = np.arange(len(queries))
            ids = self.split.passages.ids(best[1]).tolist()
            rankings = dict(zip(self.split.queries.ids(rows).tolist(), ids, strict=True))
            rankings = {name: ranking for name, ranking in rankings.items() if name in self.split.judgements}
            means, _ = evaluate_rankings(rankings, self.split.judgements, [self.k])
            found = torch.tensor([means[name] for name in names], dtype=torch.float64)
        found = found.to(self.place.device)
        dist.broadcast(found, 0)
        return dict(zip(names, found.tolist(), strict=True))

    def _all_queries(self) -> Floats:
        """Vectors [Q, D] of all queries, on every worker."""
        parts = [*self._encoded(self.split.queries, "query")]
        dimension = largest_of_workers(max((vectors.shape[1] for _, vectors in parts), default=0), self.place.device)
        found = torch.zeros((len(self.split.queries), dimension))
        for rows, vectors in parts:
            found[torch.from_numpy(rows)] = torch.from_numpy(vectors)
        found = found.to(self.place.device)
        dist.all_reduce(found)  # each row is of one worker, and 0 on the others
        return np.asarray(found.cpu().numpy(), np.float32)

    def _best_of_own(self, queries: Floats) -> "Top | None":
        """Scores and rows [Q, at most k] of this worker's passages. None: it has none."""
        from rayembed.search.merge import fold_top_k

        tops = (self._of_piece(queries, *piece) for piece in self._encoded(self.split.passages, "passage"))
        first = next(tops, None)
        return None if first is None else fold_top_k(chain([first], tops), self.k, self.split.passages.ids)

    def _of_piece(self, queries: Floats, rows: NDArray[np.int64], vectors: Floats) -> "Top":
        from rayembed.search.backends import open_index
        from rayembed.search.exact import top_k

        index = open_index("torch-gpu" if self.place.device.type == "cuda" else "torch", vectors)
        scores, places = top_k(queries, vectors, lambda own: self.split.passages.ids(rows[own]), self.k, index=index)
        return scores, rows[places]

    def _best_of_all(self, own: "Top | None", num_queries: int) -> "Top | None":
        """The best of all workers' passages on worker 0, None on the others."""
        from rayembed.search.merge import merge_top_k

        scores, rows = np.full((num_queries, self.k), -np.inf, np.float32), np.full((num_queries, self.k), -1, np.int64)
        if own is not None:
            width = own[0].shape[1]
            scores[:, :width], rows[:, :width] = own
        all_scores, all_rows = (self._of_all_workers(torch.from_numpy(part)) for part in (scores, rows))
        return merge_top_k(all_scores, all_rows, self.k, self.split.passages.ids) if self.place.rank == 0 else None

    def _of_all_workers(self, own: Tensor) -> list[NDArray[Any]]:
        own = own.to(self.place.device)
        parts = [torch.empty_like(own) for _ in range(self.place.world_size)]
        dist.all_gather(parts, own)
        return [part.cpu().numpy() for part in parts]

    def _encoded(self, texts: TextTokens, side: str) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Rows and vectors of this worker's share, some batches at a time.

        Raises:
            FloatingPointError: a vector is not finite.
        """
        rows, vectors, size, number = list[NDArray[np.int64]](), list[Tensor](), self.split.block_rows[side], 0
        batch = list[NDArray[np.int32]]()
        for first in range(0, len(texts), size):
            block = texts.block(first, min(first + size, len(texts)))
            for group in padded_groups([len(own) for own in block], tokens_per_chunk=self.tokens_per_batch):
                batch = [block[i] for i in group]
                if number % self.place.world_size == self.place.rank:
                    rows.append(first + np.array(group))
                    vectors.append(self._vectors(batch))
                number += 1
            if sum(map(len, rows)) >= PIECE:
                yield _joined(rows, vectors)
                rows, vectors = [], []
        if self.engine.stage == 3 and self.place.rank >= number % self.place.world_size > 0:
            self._vectors(batch)  # all workers gather the weights in every pass, also those that have one batch fewer
        if rows:
            yield _joined(rows, vectors)

    def _vectors(self, batch: list[Any]) -> Tensor:
        """[n, D] float32 of one batch, longest text first, where the model lies."""
        padded = pad_chunks(batch, pad_token=self.pad_token, padding_side=self.padding_side)
        found: Any = self.engine([padded.to(self.place.device)])[0]
        vectors: Tensor = found["dense"] if isinstance(found, dict) else found
        return vectors.float()


def _joined(rows: list[NDArray[np.int64]], vectors: list[Tensor]) -> tuple[NDArray[np.int64], Floats]:
    found = torch.cat(vectors)
    if not torch.isfinite(found).all():
        raise FloatingPointError("the model gives vectors that are not finite for texts of the dev split")
    return np.concatenate(rows), found.cpu().numpy()
