"""Backbone, pooling and normalisation as one module: token batches in, vectors out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.models.decoders import positions
from rayembed.models.pooling import POOLINGS


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


@dataclass(frozen=True)
class TokenBatch:
    """Texts as padded chunks. `order[i]` is the row of text i in the chunks put one after the other."""

    chunks: tuple[Chunk, ...]

    order: Tensor
    """[N] int64."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on a device, copied while the device goes on working."""
        return TokenBatch(tuple(chunk.to(device) for chunk in self.chunks), self.order.to(device, non_blocking=True))

    def pinned(self) -> "TokenBatch":
        """The same batch in memory that a GPU copies from by itself."""
        return TokenBatch(tuple(chunk.pinned() for chunk in self.chunks), self.order)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(int(chunk.mask.sum()) for chunk in self.chunks)

    @property
    def num_slots(self) -> int:
        """Tokens with padding: what the arithmetic pays for."""
        return sum(chunk.mask.numel() for chunk in self.chunks)


class ChunkModel(nn.Module):
    """A model that reads texts chunk by chunk: what it gives for a batch is put together of what it gives for each."""

    def of_chunk(self, chunk: Chunk) -> Any:  # noqa: ANN401 - a tensor, or a dict of some, with a row a text
        """What the model gives for the texts of one chunk."""
        raise NotImplementedError

    def joined(self, parts: Sequence[Any]) -> Any:  # noqa: ANN401
        """What it gives for the texts of several chunks, one after the other."""
        return torch.cat([*parts])

    def of_batch(self, batch: TokenBatch) -> Any:  # noqa: ANN401
        """What it gives for N texts, in their order."""
        return in_order(self.joined([self.of_chunk(chunk) for chunk in batch.chunks]), batch.order)

    def forward(self, batches: Sequence[TokenBatch]) -> tuple[Any, ...]:
        """What it gives for several batches (queries, passages) in one call: DeepSpeed wants one forward a backward."""
        return tuple(self.of_batch(batch) for batch in batches)


def in_order(joined: Any, order: Tensor) -> Any:  # noqa: ANN401 - a tensor, or a dict of some
    """Rows in another order."""
    if isinstance(joined, Tensor):
        return joined[order]
    return {name: rows[order] for name, rows in joined.items()}


class Embedder(ChunkModel):
    """An encoder whose output is one vector a text."""

    def __init__(self, backbone: nn.Module, *, pooling: str, normalize: bool, told_positions: bool = False) -> None:
        """Takes the parts.

        Args:
            backbone: of transformers.
            pooling: a key of POOLINGS.
            normalize: scale vectors to length 1.
            told_positions: give the backbone each token's position: it would count padding on the left.
        """
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize
        self.told_positions = told_positions

    def embed(self, batch: TokenBatch) -> Tensor:
        """Vectors [N, D] in float32, in the order of the texts."""
        return torch.cat([self.dense(chunk) for chunk in batch.chunks])[batch.order]

    def of_chunk(self, chunk: Chunk) -> Any:  # noqa: ANN401 - a subclass gives more
        """Vectors [n, D] in float32."""
        return self.dense(chunk)

    def dense(self, chunk: Chunk) -> Tensor:
        """Vectors [n, D] in float32."""
        return self.pool(self.hidden(chunk), chunk.mask)

    def hidden(self, chunk: Chunk) -> Tensor:
        """Token vectors [n, t, H] of the backbone's last layer."""
        told = {"position_ids": positions(chunk.mask)} if self.told_positions else {}
        hidden: Tensor = self.backbone(input_ids=chunk.ids, attention_mask=chunk.mask, **told).last_hidden_state
        return hidden

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors [n, D] in float32 out of token vectors."""
        vectors = POOLINGS[self.pooling](hidden, mask).float()
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


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
    multiple = pad_to_multiple_of or 1
    descending = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    chunks, start = [], 0
    while start < len(descending):
        length = -(-len(texts[descending[start]]) // multiple) * multiple
        count = min(texts_per_chunk or len(texts), len(descending) - start)
        if tokens_per_chunk is not None:
            count = max(1, min(count, tokens_per_chunk // length))
        rows = descending[start : start + count]
        ids, mask = _pad([texts[i] for i in rows], length, pad_token, padding_side)
        kinds = None if types is None else _pad([types[i] for i in rows], length, 0, padding_side)[0]
        chunks.append(Chunk(ids, mask, kinds))
        start += count
    order = torch.empty(len(texts), dtype=torch.long)
    order[torch.tensor(descending)] = torch.arange(len(texts))
    return TokenBatch(tuple(chunks), order)


def _pad(texts: list[Sequence[int]], length: int, pad_token: int, padding_side: str) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(texts), length), pad_token, dtype=torch.long)
    mask = torch.zeros((len(texts), length), dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if padding_side == "left" else slice(0, len(text))
        ids[row, place] = torch.tensor(text, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask
