"""Backbone, pooling and normalisation as one module: token batches in, vectors out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.models.pooling import POOLINGS


@dataclass(frozen=True)
class TokenBatch:
    """Texts as padded chunks. `order[i]` is the row of text i in the chunks put one after the other."""

    chunks: tuple[tuple[Tensor, Tensor], ...]
    """(input_ids [n, t] int64, attention_mask [n, t] int64) of each chunk."""

    order: Tensor
    """[N] int64."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on a device, copied while the device goes on working."""
        chunks = tuple(
            (ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)) for ids, mask in self.chunks
        )
        return TokenBatch(chunks, self.order.to(device, non_blocking=True))

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(int(mask.sum()) for _, mask in self.chunks)

    @property
    def num_slots(self) -> int:
        """Tokens with padding: what the arithmetic pays for."""
        return sum(mask.numel() for _, mask in self.chunks)


class Embedder(nn.Module):
    """An encoder whose output is one vector a text."""

    def __init__(self, backbone: nn.Module, *, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize

    def embed(self, batch: TokenBatch) -> Tensor:
        """Vectors [N, D] in float32, in the order of the texts."""
        vectors = [self._embed_chunk(ids, mask) for ids, mask in batch.chunks]
        return torch.cat(vectors)[batch.order]

    def _embed_chunk(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors = POOLINGS[self.pooling](hidden, mask).float()
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def forward(self, batches: Sequence[TokenBatch]) -> tuple[Tensor, ...]:
        """Vectors of several batches (queries, passages) in one call: DeepSpeed wants one forward a backward."""
        return tuple(self.embed(batch) for batch in batches)


def pad_chunks(
    texts: Sequence[Sequence[int]],
    *,
    pad_token: int,
    padding_side: str,
    pad_to_multiple_of: int | None = None,
    texts_per_chunk: int | None = None,
    tokens_per_chunk: int | None = None,
) -> TokenBatch:
    """Token ids of N texts as padded chunks, longest texts first, so that a chunk holds texts of like length.

    Args:
        texts: token ids of each text, special tokens included; at least one text, none empty.
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
        chunks.append(_pad([texts[i] for i in descending[start : start + count]], length, pad_token, padding_side))
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
