"""From the plan and the tokens to one worker's batch, built by a thread that works ahead of the training step."""

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayembed.data.datasets import Dataset, Datasets
from rayembed.data.labels import LabelIndex, choose_labelled_group
from rayembed.data.plan import Plan, choose_group
from rayembed.data.prompts import ALIKE
from rayembed.data.shuffle import shuffled_positive
from rayembed.data.tasks import CLASS, STS
from rayembed.data.tokens import TokenRow, TokenStore
from rayembed.models.chunks import TokenBatch, pack_chunks, pad_chunks
from rayembed.models.pairs import PairLayout
from rayembed.training.in_context import InContext

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
    """[B, G] the teacher's scores, or of scored pairs [B, 1] the people's; None without distillation."""

    keys: Keys
    dataset: Dataset
    """What the rows are of: group size, loss, and whether groups stay alone."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        teacher = None if self.teacher is None else self.teacher.to(device, non_blocking=True)
        return replace(
            self,
            inputs=tuple(texts.to(device) for texts in self.inputs),
            teacher=teacher,
            keys=self.keys.to(device),
        )

    @property
    def num_queries(self) -> int:
        """B."""
        return len(self.keys.queries)


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Everything that a batch is made from; the same on every worker but for `rank`."""

    tokens: TokenStore
    datasets: Datasets
    plan: Plan
    rank: int
    world_size: int
    distill: bool
    shuffle_ratio: float = 0.0
    special_tokens: tuple[int, int] = (1, 1)
    """How many the tokenizer puts before and after a text, which stay where they are when a text is shuffled."""

    layout: PairLayout | None
    """How query and passage become one text. None: they stay two."""

    in_context: InContext | None = None
    """Puts examples before queries. None: queries are read alone."""

    packed: bool = False
    """Texts lie one after the other, without padding; then the next three are not read."""

    pad_token: int
    padding_side: str
    pad_to_multiple_of: int | None
    sub_batch_size: int | None
    tokens_per_chunk: int | None = None
    pin_memory: bool

    @cached_property
    def _labels(self) -> LabelIndex:
        return LabelIndex.of(self.datasets)

    def batch(self, number: int) -> Batch:
        """This worker's part of a batch, by the batch's number from the start of training."""
        of_all = self.plan.rows(number)
        rows = np.split(of_all, self.world_size)[self.rank].tolist()
        dataset, epoch = self.datasets.items[self.plan.dataset(number)], self.plan.dataset_epoch(number)
        groups = [self._group(row, dataset, epoch) for row in rows]
        queries = [group.query for group in groups]
        passages = [passage for group in groups for passage in group.passages]
        scores = [group.scores for group in groups if group.scores is not None]
        if dataset.type == CLASS:  # all texts of a label are alike: none is a negative of another
            labels = [[_number_key(int(self.datasets.labels[row]))] for row in rows]
            of_passages = [_number_key(label) for group in groups for label in group.labels]
        else:
            labels = [[*map(_key, group.positives)] for group in groups]
            of_passages = [*map(_key, passages)]
        read = queries
        if self.in_context is not None:
            positives = [group.positive_row for group in groups]
            after = self.in_context.queries(rows, of_all, kind=dataset.type, epoch=epoch, positives=positives)
            read = queries if after is None else after
        return Batch(
            self._inputs(read, passages, dataset.group_size),
            torch.from_numpy(np.stack(scores)) if scores else None,
            Keys(torch.tensor([*map(_key, queries)]), _padded(labels), torch.tensor(of_passages)),
            dataset,
        )

    def _group(self, row: int, dataset: Dataset, epoch: int) -> "_Group":
        tokens, seed = self.tokens.row(row), self.plan.seed
        if dataset.type == CLASS:
            positive, negatives = choose_labelled_group(
                seed, epoch, row, index=self._labels, group_size=dataset.group_size
            )
            drawn = [positive, *negatives.tolist()]
            texts = [self.tokens.row(other).query for other in drawn]
            labels = [int(self.datasets.labels[other]) for other in drawn]
            return _Group(tokens.query, texts, None, [], labels, positive_row=positive)
        positive, negatives = choose_group(
            seed,
            epoch,
            row,
            num_pos=len(tokens.pos),
            num_neg=len(tokens.neg),
            group_size=dataset.group_size,
        )
        before, after = self.special_tokens
        read = shuffled_positive(
            tokens.pos[positive],
            seed=seed,
            epoch=epoch,
            row=row,
            ratio=0.0 if dataset.type in ALIKE else self.shuffle_ratio,  # instruction and suffix have their places
            before=before,
            after=after,
        )
        passages = [read, *(tokens.neg[i] for i in negatives)]
        taught = self.distill or dataset.type == STS
        scores = _teacher_scores(tokens, positive, negatives) if taught else None
        return _Group(tokens.query, passages, scores, tokens.pos, [])

    def _inputs(self, queries: list[Tokens], passages: list[Tokens], group_size: int) -> tuple[TokenBatch, ...]:
        if self.layout is None:
            return self._in_chunks(queries), self._in_chunks(passages)
        pairs = [self.layout.pack(queries[i // group_size], passage) for i, passage in enumerate(passages)]
        types = None if self.layout.types is None else [kinds for _, kinds in pairs]
        return (self._in_chunks([ids for ids, _ in pairs], types),)

    def longest_text(self) -> tuple[list[int], list[int] | None]:
        """As long as the model will read any, with the types of its tokens, if it is told these."""
        row = self.tokens.row(int(self.tokens.lengths().argmax()))
        longest = max([row.query, *row.pos, *row.neg], key=len)
        if self.layout is not None:  # the longest query may be in another row
            return self.layout.pack(np.resize(row.query, self.layout.query_max_len), longest)
        if self.in_context is None or not self.in_context.reader.icl.max_examples:
            return longest.tolist(), None
        before = self.in_context.reader.icl.examples_max_len
        return np.resize(longest, max(len(longest), self.in_context.query_max_len + before)).tolist(), None

    def copies_of_longest(self, count: int) -> TokenBatch:
        """So many texts, each the longest."""
        ids, types = self.longest_text()
        return self._in_chunks([ids] * count, None if types is None else [types] * count)

    def _in_chunks(self, texts: Sequence[Any], types: Sequence[Any] | None = None) -> TokenBatch:
        limits = {"texts_per_chunk": self.sub_batch_size, "tokens_per_chunk": self.tokens_per_chunk}
        if self.packed:
            batch = pack_chunks(texts, types=types, **limits)
        else:
            batch = pad_chunks(
                texts,
                types=types,
                pad_token=self.pad_token,
                padding_side=self.padding_side,
                pad_to_multiple_of=self.pad_to_multiple_of,
                **limits,
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


@dataclass(frozen=True)
class _Group:
    """A row's query with the passages that were drawn for it, the positive first."""

    query: Tokens
    passages: list[Tokens]
    scores: NDArray[np.float32] | None
    """[G]"""

    positives: list[Tokens]
    """All of the row."""

    labels: list[int]
    """Of labelled texts: of each passage."""

    positive_row: int | None = None
    """Of labelled texts: the row that is the positive."""


def _teacher_scores(tokens: TokenRow, positive: int, negatives: NDArray[np.int64]) -> NDArray[np.float32]:
    assert tokens.pos_scores is not None, "checked before training"
    if not len(negatives):
        return tokens.pos_scores[[positive]].astype(np.float32)
    assert tokens.neg_scores is not None, "checked before training"
    return np.concatenate([tokens.pos_scores[[positive]], tokens.neg_scores[negatives]]).astype(np.float32)


def _padded(keys: list[list[int]]) -> Tensor:
    most = max(map(len, keys))
    return torch.tensor([[*own, *[0] * (most - len(own))] for own in keys])


def _number_key(number: int) -> int:
    return number + 1


def _key(text: Tokens) -> int:
    return int.from_bytes(hashlib.blake2b(text.tobytes(), digest_size=8).digest(), "little") >> 1 or 1
