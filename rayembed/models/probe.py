"""Vectors of a few texts in the training process, against which every export is checked."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import encode
from rayembed.models.export import max_seq_length


def probe_vectors(
    model: Embedder, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], experiment: Experiment
) -> NDArray[np.float32]:
    """Vectors [N, D] in float32 of texts as they are, without prompts, cut to the exported model's length."""
    return encode(
        model,
        tokenizer,
        texts,
        max_len=max_seq_length(experiment),
        tokens_per_batch=4096,
        dtype=torch.float32,
    )


def write_probe(folder: Path, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
    """Keeps texts and vectors as probe.json and probe.npy."""
    (folder / "probe.json").write_text(json.dumps(list(texts), ensure_ascii=False))
    np.save(folder / "probe.npy", vectors)


def read_probe(folder: Path) -> tuple[list[str], NDArray[np.float32]]:
    """What `write_probe` kept.

    Raises:
        FileNotFoundError: the folder holds no probe.
    """
    return json.loads((folder / "probe.json").read_text()), np.load(folder / "probe.npy")


def least_cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """The smallest cosine between rows of the same number: 1 where vectors point the same way."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float((np.sum(first.astype(np.float64) * second, axis=1) / norms).min())
