"""From the plan and the tokens to one worker's batch, built by a thread that works ahead of the training step."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayembed.data.plan import BatchPlan, choose_group
from rayembed.data.tokens import TokenRow, TokenStore
from rayembed.models.embedder import TokenBatch, pad_chunks


@dataclass(frozen=True)
class Batch:
    """One worker's part of a batch: B queries, each with a group of G passages, the positive first."""

    queries: TokenBatch
    """B texts."""

    passages: TokenBatch
    """B x G texts, query by query."""

    teacher: Tensor | None
    """[B, G] the teacher's scores; None without distillation."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        teacher = None if self.teacher is None else self.teacher.to(device, non_blocking=True)
        return Batch(self.queries.to(device), self.passages.to(device), teacher)


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Everything that a batch is made from; the same on every worker but for `rank`."""

    tokens: TokenStore
    plan: BatchPlan
    rank: int
    world_size: int
    group_size: int
    distill: bool
    pad_token: int
    padding_side: str
    pad_to_multiple_of: int | None
    sub_batch_size: int | None
    pin_memory: bool

    def batch(self, number: int) -> Batch:
        """This worker's part of a batch, by the batch's number from the start of training."""
        rows = np.split(self.plan.rows(number), self.world_size)[self.rank]
        epoch = self.plan.epoch(number)
        queries, passages, teacher = [], [], []
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
            if self.distill:
                teacher.append(_teacher_scores(tokens, positive, negatives))
        batch = Batch(
            self._pad(queries), self._pad(passages), torch.from_numpy(np.stack(teacher)) if self.distill else None
        )
        return _pin(batch) if self.pin_memory else batch

    def _pad(self, texts: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> TokenBatch:
        return pad_chunks(
            texts,  # type: ignore[arg-type] # arrays serve as sequences of ints
            pad_token=self.pad_token,
            padding_side=self.padding_side,
            pad_to_multiple_of=self.pad_to_multiple_of,
            texts_per_chunk=self.sub_batch_size,
        )

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


def _teacher_scores(
    tokens: TokenRow, positive: int, negatives: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    assert tokens.pos_scores is not None, "checked before training"
    assert tokens.neg_scores is not None, "checked before training"
    return np.concatenate([tokens.pos_scores[[positive]], tokens.neg_scores[negatives]]).astype(np.float32)


def _pin(batch: Batch) -> Batch:
    def pinned(part: TokenBatch) -> TokenBatch:
        return TokenBatch(tuple((ids.pin_memory(), mask.pin_memory()) for ids, mask in part.chunks), part.order)

    teacher = None if batch.teacher is None else batch.teacher.pin_memory()
    return Batch(pinned(batch.queries), pinned(batch.passages), teacher)
