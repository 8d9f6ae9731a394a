"""From the plan and the tokens to one worker's batch, built by a thread that works ahead of the training step."""

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayembed.data.plan import BatchPlan, choose_group
from rayembed.data.tokens import TokenRow, TokenStore
from rayembed.models.embedder import TokenBatch, pad_chunks
from rayembed.models.pairs import PairLayout

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Keys:
    """What tells texts apart, as 63 bits of a hash of their tokens: equal keys are equal texts."""

    queries: Tensor
    """[B] int64."""

    positives: Tensor
    """[B, K] int64: all positives of each query's row, also those that were not drawn; 0 where there are fewer."""

    passages: Tensor
    """[B x G] int64."""

    def to(self, device: torch.device) -> "Keys":
        """The same keys on a device."""
        return Keys(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """One worker's part of a batch: B queries, each with a group of G passages, the positive first."""

    inputs: tuple[TokenBatch, ...]
    """For embedders B queries, and B x G passages query by query; for rerankers B x G pairs."""

    teacher: Tensor | None
    """[B, G] the teacher's scores; None without distillation."""

    keys: Keys

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        teacher = None if self.teacher is None else self.teacher.to(device, non_blocking=True)
        return Batch(tuple(texts.to(device) for texts in self.inputs), teacher, self.keys.to(device))

    @property
    def num_queries(self) -> int:
        """B."""
        return len(self.keys.queries)


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Everything that a batch is made from; the same on every worker but for `rank`."""

    tokens: TokenStore
    plan: BatchPlan
    rank: int
    world_size: int
    group_size: int
    distill: bool
    layout: PairLayout | None
    """How query and passage become one text. None: they stay two."""

    pad_token: int
    padding_side: str
    pad_to_multiple_of: int | None
    sub_batch_size: int | None
    pin_memory: bool

    def batch(self, number: int) -> Batch:
        """This worker's part of a batch, by the batch's number from the start of training."""
        rows = np.split(self.plan.rows(number), self.world_size)[self.rank]
        epoch = self.plan.epoch(number)
        queries: list[Tokens] = []
        passages: list[Tokens] = []
        known: list[list[Tokens]] = []
        teacher = []
        for row in rows.tolist():
            tokens = self.tokens.row(row)
            positive, negatives = choose_group(
                self.plan.seed,
                epoch,
                row,
                num_pos=len(tokens.pos),
                num_neg=len(tokens.neg),
                group_size=self.group_size,
            )
            queries.append(tokens.query)
            passages += [tokens.pos[positive], *(tokens.neg[i] for i in negatives)]
            known.append(tokens.pos)
            if self.distill:
                teacher.append(_teacher_scores(tokens, positive, negatives))
        return Batch(
            self._inputs(queries, passages),
            torch.from_numpy(np.stack(teacher)) if self.distill else None,
            _keys(queries, known, passages),
        )

    def _inputs(self, queries: list[Tokens], passages: list[Tokens]) -> tuple[TokenBatch, ...]:
        if self.layout is None:
            return self._pad(queries), self._pad(passages)
        packed = [self.layout.pack(queries[i // self.group_size], passage) for i, passage in enumerate(passages)]
        types = None if self.layout.types is None else [kinds for _, kinds in packed]
        return (self._pad([ids for ids, _ in packed], types),)

    def _pad(self, texts: Sequence[Any], types: Sequence[Any] | None = None) -> TokenBatch:
        batch = pad_chunks(
            texts,
            types=types,
            pad_token=self.pad_token,
            padding_side=self.padding_side,
            pad_to_multiple_of=self.pad_to_multiple_of,
            texts_per_chunk=self.sub_batch_size,
        )
        return batch.pinned() if self.pin_memory else batch

    def ahead(self, first: int, last: int, *, depth: int = 3) -> Iterator[Batch]:
        """Batches `first` to `last` - 1, each built while an earlier one is trained on; `depth` wait at most."""
        ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=depth)
        stop = threading.Event()

        def put(item: Batch | Exception) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.5)
                except queue.Full:
                    continue

        def build() -> None:
            for number in range(first, last):
                if stop.is_set():
                    return
                try:
                    put(self.batch(number))
                except Exception as error:  # whatever it is, it is raised again in the training thread
                    return put(error)

        threading.Thread(target=build, daemon=True, name="batches").start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()


def _teacher_scores(tokens: TokenRow, positive: int, negatives: NDArray[np.int64]) -> NDArray[np.float32]:
    assert tokens.pos_scores is not None, "checked before training"
    assert tokens.neg_scores is not None, "checked before training"
    return np.concatenate([tokens.pos_scores[[positive]], tokens.neg_scores[negatives]]).astype(np.float32)


def _keys(queries: list[Tokens], positives: list[list[Tokens]], passages: list[Tokens]) -> Keys:
    most = max(map(len, positives))
    known = [[*map(_key, texts), *[0] * (most - len(texts))] for texts in positives]
    return Keys(torch.tensor([*map(_key, queries)]), torch.tensor(known), torch.tensor([*map(_key, passages)]))


def _key(text: Tokens) -> int:
    return int.from_bytes(hashlib.blake2b(text.tobytes(), digest_size=8).digest(), "little") >> 1 or 1
