"""Backbone, pooling and normalisation as one module: token batches in, vectors out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.models.chunks import Chunk, Packed, TokenBatch, in_order
from rayembed.models.decoders import positions
from rayembed.models.pooling import PACKED_POOLINGS, POOLINGS


class ChunkModel(nn.Module, ABC):
    """A model that reads texts chunk by chunk: what it gives for a batch is put together of what it gives for each."""

    gives_rows = True
    """Whether it gives a tensor with a row a text, which is of one size whatever the texts beside it."""

    @abstractmethod
    def of_chunk(self, chunk: Chunk | Packed) -> Any:  # noqa: ANN401 - a tensor, or a dict of some, with a row a text
        """What the model gives for the texts of one chunk."""

    def joined(self, parts: Sequence[Any]) -> Any:  # noqa: ANN401 - as of_chunk's
        """What it gives for the texts of several chunks, one after the other."""
        return torch.cat([*parts])

    def of_batch(self, batch: TokenBatch) -> Any:  # noqa: ANN401 - as of_chunk's
        """What it gives for N texts, in their order."""
        return in_order(self.joined([self.of_chunk(chunk) for chunk in batch.chunks]), batch.order)

    def forward(self, batches: Sequence[TokenBatch]) -> tuple[Any, ...]:
        """What it gives for several batches (queries, passages) in one call: DeepSpeed wants one forward a backward.

        Packed batches that are to be of one chunk each are read in one pass: few queries alone would not fill a GPU.
        """
        chunks = [batch.chunks[0] for batch in batches if not batch.limited]
        packed = [chunk for chunk in chunks if isinstance(chunk, Packed)]
        if len(packed) < max(2, len(batches)) or not self.gives_rows:
            return tuple(self.of_batch(batch) for batch in batches)
        parts = torch.split(self.of_chunk(Packed.joined(packed)), [chunk.num_texts for chunk in packed])
        return tuple(part[batch.order] for part, batch in zip(parts, batches, strict=True))


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

    def of_chunk(self, chunk: Chunk | Packed) -> Any:  # noqa: ANN401 - a subclass gives more
        """Vectors [n, D] in float32."""
        return self.dense(chunk)

    def dense(self, chunk: Chunk | Packed) -> Tensor:
        """Vectors [n, D] in float32."""
        return self.pool(self.hidden(chunk), chunk)

    def hidden(self, chunk: Chunk | Packed) -> Tensor:
        """Token vectors of the backbone's last layer: [n, t, H], of packed texts [t, H]."""
        if isinstance(chunk, Packed):
            row: Tensor = self.backbone(**chunk.inputs(self.backbone)).last_hidden_state
            return row[0, : chunk.num_tokens]
        told = {"position_ids": positions(chunk.mask)} if self.told_positions else {}
        hidden: Tensor = self.backbone(input_ids=chunk.ids, attention_mask=chunk.mask, **told).last_hidden_state
        return hidden

    def pool(self, hidden: Tensor, chunk: Chunk | Packed) -> Tensor:
        """Vectors [n, D] in float32 out of what `hidden` gives."""
        if isinstance(chunk, Packed):
            vectors = PACKED_POOLINGS[self.pooling](hidden, chunk.starts).float()
        else:
            vectors = POOLINGS[self.pooling](hidden, chunk.mask).float()
        return F.normalize(vectors, dim=-1) if self.normalize else vectors
