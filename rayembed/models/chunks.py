"""Texts as a model reads them: tokens in chunks, padded to one length or packed one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rayembed.models.few_sizes import rounded_up
from rayembed.models.packing import Segments, packed_inputs


class Chunk(NamedTuple):
    """Texts padded to one length. Shapes: n texts, t tokens."""

    ids: Tensor
    """[n, t] int64."""

    mask: Tensor
    """[n, t] int64: 1 token, 0 padding."""

    types: Tensor | None = None
    """[n, t] int64, of pairs: which text a token is of. None: not read."""

    def to(self, device: torch.device) -> "Chunk":
        """The same chunk on a device, copied while the device goes on working."""
        types = None if self.types is None else self.types.to(device, non_blocking=True)
        return Chunk(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True), types)

    def pinned(self) -> "Chunk":
        """The same chunk in memory that a GPU copies from by itself."""
        return Chunk(
            self.ids.pin_memory(), self.mask.pin_memory(), None if self.types is None else self.types.pin_memory()
        )

    @property
    def num_texts(self) -> int:
        """Number n."""
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())

    @property
    def num_slots(self) -> int:
        """Tokens with padding, n x t."""
        return self.ids.numel()


class Packed(NamedTuple):
    """Texts one after the other in one row, without padding. Shapes: n texts, t tokens of all of them."""

    ids: Tensor
    """[t] int64."""

    places: Tensor
    """[t] int64, position of each token in its text, from 0."""

    starts: Tensor
    """[n + 1] int32, where each text begins; the last is t."""

    lengths: tuple[int, ...]
    """[n], on the host."""

    types: Tensor | None = None
    """[t] int64, of pairs: which text a token is of. None: not read."""

    def to(self, device: torch.device) -> "Packed":
        """The same chunk on a device, copied while the device goes on working."""
        return self._with([None if own is None else own.to(device, non_blocking=True) for own in self._tensors()])

    def pinned(self) -> "Packed":
        """The same chunk in memory that a GPU copies from by itself."""
        return self._with([None if own is None else own.pin_memory() for own in self._tensors()])

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.places, self.starts, self.types

    def _with(self, tensors: Sequence[Any]) -> "Packed":
        ids, places, starts, types = tensors
        return Packed(ids, places, starts, self.lengths, types)

    @property
    def num_texts(self) -> int:
        """Number n."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number t."""
        return sum(self.lengths)

    @property
    def num_slots(self) -> int:
        """The same t: nothing is padded."""
        return self.num_tokens

    def inputs(self, backbone: nn.Module) -> dict[str, Any]:
        """What a backbone is called with that `packing.let_pack` has prepared; it gives t rows, and maybe some more."""
        read = self._filled() if self.ids.device.type == "cpu" else self
        told = packed_inputs(backbone, read.ids, read.places, Segments(read.starts, read.lengths))
        return told if read.types is None else told | {"token_type_ids": read.types[None]}

    def _filled(self) -> "Packed":
        """The same texts and maybe one more, so that t is one of few numbers."""
        missing = rounded_up(self.num_tokens) - self.num_tokens
        if not missing:
            return self
        ids, places, types = (
            None if own is None else torch.cat([own, own[:1].expand(missing)])
            for own in (self.ids, self.places, self.types)
        )
        ends = torch.cat([self.starts, self.starts[-1:] + missing])
        return self._with([ids, places, ends, types])._replace(lengths=(*self.lengths, missing))

    @classmethod
    def joined(cls, chunks: Sequence["Packed"]) -> "Packed":
        """The texts of several chunks in one row, on the device where they lie; all have types, or none has."""
        ends = [0, *accumulate(chunk.num_tokens for chunk in chunks)]
        types = [chunk.types for chunk in chunks if chunk.types is not None]
        return cls(
            torch.cat([chunk.ids for chunk in chunks]),
            torch.cat([chunk.places for chunk in chunks]),
            torch.cat(
                [chunks[0].starts[:1], *(chunk.starts[1:] + end for chunk, end in zip(chunks, ends, strict=False))]
            ),
            tuple(length for chunk in chunks for length in chunk.lengths),
            torch.cat(types) if types else None,
        )

    def padded(self, rows: Tensor) -> Tensor:
        """[n, T, ...] from rows [t, ...] for the tokens: each text's own, then zeros up to the longest's length."""
        return pad_sequence([*torch.split(rows, list(self.lengths))], batch_first=True)

    @property
    def mask(self) -> Tensor:
        """[n, T] int64: 1 token, 0 padding, of what `padded` gives."""
        lengths = self.starts.diff()[:, None]
        return (torch.arange(max(self.lengths), device=lengths.device) < lengths).long()


@dataclass(frozen=True)
class TokenBatch:
    """Texts in chunks. `order[i]` is the row of text i in the chunks put one after the other."""

    chunks: tuple[Chunk | Packed, ...]

    order: Tensor
    """[N] int64."""

    limited: bool = False
    """Whether chunks were given a largest size, so that none is to be read together with others."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on a device, copied while the device goes on working."""
        chunks = tuple(chunk.to(device) for chunk in self.chunks)
        return TokenBatch(chunks, self.order.to(device, non_blocking=True), self.limited)

    def pinned(self) -> "TokenBatch":
        """The same batch in memory that a GPU copies from by itself."""
        return TokenBatch(tuple(chunk.pinned() for chunk in self.chunks), self.order, self.limited)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_slots(self) -> int:
        """Tokens with padding: what the arithmetic pays for."""
        return sum(chunk.num_slots for chunk in self.chunks)


def in_order(joined: Any, order: Tensor) -> Any:  # noqa: ANN401 - a tensor, or a dict of some
    """Rows in another order."""
    if isinstance(joined, Tensor):
        return joined[order]
    return {name: rows[order] for name, rows in joined.items()}


def pad_chunks(
    texts: Sequence[Sequence[int]],
    *,
    types: Sequence[Sequence[int]] | None = None,
    pad_token: int,
    padding_side: str,
    pad_to_multiple_of: int | None = None,
    texts_per_chunk: int | None = None,
    tokens_per_chunk: int | None = None,
) -> TokenBatch:
    """Token ids of N texts as padded chunks, longest texts first, so that a chunk holds texts of like length.

    Args:
        texts: token ids of each text, special tokens included; at least one text, none empty.
        types: of each text, the types of its tokens. None: they have none.
        pad_token: id that fills the padding.
        padding_side: left or right.
        pad_to_multiple_of: chunks' lengths are rounded up to this. None: not rounded.
        texts_per_chunk: texts in a chunk. None: no limit.
        tokens_per_chunk: tokens in a chunk, padding included; a chunk has at least one text. None: no limit.
    """
    multiple, chunks = pad_to_multiple_of or 1, []
    groups = padded_groups(
        [len(text) for text in texts],
        pad_to_multiple_of=multiple,
        texts_per_chunk=texts_per_chunk,
        tokens_per_chunk=tokens_per_chunk,
    )
    for rows in groups:
        length = -(-len(texts[rows[0]]) // multiple) * multiple
        ids, mask = _pad([texts[i] for i in rows], length, pad_token, padding_side)
        kinds = None if types is None else _pad([types[i] for i in rows], length, 0, padding_side)[0]
        chunks.append(Chunk(ids, mask, kinds))
    return TokenBatch(tuple(chunks), _order([row for rows in groups for row in rows]))


def padded_groups(
    lengths: Sequence[int],
    *,
    pad_to_multiple_of: int = 1,
    texts_per_chunk: int | None = None,
    tokens_per_chunk: int | None = None,
) -> list[list[int]]:
    """Which of N texts `pad_chunks` puts into each chunk, by their numbers.

    Args:
        lengths: tokens of each text.
        pad_to_multiple_of: as there.
        texts_per_chunk: as there.
        tokens_per_chunk: as there.
    """
    descending = _longest_first(lengths)
    groups, start = [], 0
    while start < len(descending):
        length = -(-lengths[descending[start]] // pad_to_multiple_of) * pad_to_multiple_of
        count = min(texts_per_chunk or len(lengths), len(descending) - start)
        if tokens_per_chunk is not None:
            count = max(1, min(count, tokens_per_chunk // length))
        groups.append(descending[start : start + count])
        start += count
    return groups


def pack_chunks(
    texts: Sequence[Sequence[int]],
    *,
    types: Sequence[Sequence[int]] | None = None,
    texts_per_chunk: int | None = None,
    tokens_per_chunk: int | None = None,
) -> TokenBatch:
    """Token ids of N texts as packed chunks, longest texts first, so that those of equal length lie together.

    Args:
        texts: token ids of each text, special tokens included; at least one text, none empty.
        types: of each text, the types of its tokens. None: they have none.
        texts_per_chunk: texts in a chunk. None: no limit.
        tokens_per_chunk: most tokens in a chunk; a chunk has at least one text. There are as few chunks as can be, the
            largest as small as can be. None: no limit.
    """
    descending = _longest_first([len(text) for text in texts])
    counts = _evenly([len(texts[i]) for i in descending], texts_per_chunk, tokens_per_chunk)
    parts = [descending[first:last] for first, last in pairwise([0, *accumulate(counts)])]
    limited = texts_per_chunk is not None or tokens_per_chunk is not None
    return TokenBatch(tuple(_pack(texts, types, part) for part in parts), _order(descending), limited)


def _evenly(lengths: Sequence[int], most_texts: int | None, most_tokens: int | None) -> list[int]:
    """How many of the texts, in their order, are in each chunk."""
    counts = _filled(lengths, most_texts, most_tokens)
    if most_tokens is None or len(counts) == 1:
        return counts
    low, high = -(-sum(lengths) // len(counts)), most_tokens  # the smallest limit that needs no further chunk
    while low < high:
        middle = (low + high) // 2
        tried = _filled(lengths, most_texts, middle)
        if len(tried) > len(counts):
            low = middle + 1
        else:
            counts, high = tried, middle
    return counts


def _filled(lengths: Sequence[int], most_texts: int | None, most_tokens: int | None) -> list[int]:
    counts, tokens = [0], 0
    for length in lengths:
        full = most_tokens is not None and tokens + length > most_tokens
        if counts[-1] and (full or counts[-1] == most_texts):
            counts.append(0)
            tokens = 0
        counts[-1] += 1
        tokens += length
    return counts


def _pack(texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, rows: list[int]) -> Packed:
    lengths = [len(texts[i]) for i in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    places = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(torch.tensor(lengths))
    kinds = None if types is None else _joined([types[i] for i in rows])
    return Packed(_joined([texts[i] for i in rows]), places, starts.int(), tuple(lengths), kinds)


def _joined(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.from_numpy(np.concatenate(rows).astype(np.int64))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _order(descending: list[int]) -> Tensor:
    order = torch.empty(len(descending), dtype=torch.long)
    order[torch.tensor(descending)] = torch.arange(len(descending))
    return order


def _pad(texts: list[Sequence[int]], length: int, pad_token: int, padding_side: str) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(texts), length), pad_token, dtype=torch.long)
    mask = torch.zeros((len(texts), length), dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if padding_side == "left" else slice(0, len(text))
        ids[row, place] = torch.tensor(text, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask
