"""Rankings by numpy over vectors that were made one text at a time: what every search of the jobs has to find."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rayembed.config.model import ModelConfig
from rayembed.models.encoding import encode
from rayembed.models.loading import load_embedder, load_tokenizer


def vectors(model: Path, texts: Sequence[str], max_len: int) -> NDArray[np.float32]:
    """Vectors [N, D] of a folder's weights under mean pooling."""
    config = ModelConfig(name_or_path=str(model), pooling="mean")
    embedder, tokenizer = load_embedder(config), load_tokenizer(str(model), padding_side="right")
    return np.concatenate(
        [
            encode(embedder, tokenizer, [text], max_len=max_len, tokens_per_batch=4096, dtype=torch.float32)
            for text in texts
        ]
    )


def rankings(
    model: Path, queries: dict[str, str], passages: dict[str, str], lengths: tuple[int, int]
) -> dict[str, list[str]]:
    """All passage ids for every query, best first, ties by id; `lengths` are tokens kept of queries and passages.

    Products are rounded, so that copies of a text tie here as they do in the jobs.
    """
    passage_vectors = vectors(model, list(passages.values()), lengths[1])
    ranked = {}
    for query, vector in zip(queries, vectors(model, list(queries.values()), lengths[0]), strict=True):
        scores = (passage_vectors @ vector).tolist()
        ordered = sorted((-round(score, 6), name) for name, score in zip(passages, scores, strict=True))
        ranked[query] = [name for _, name in ordered]
    return ranked
