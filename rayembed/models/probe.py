"""What the trained model gives for a few texts in the training process, against which every export is checked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.score import ScoreConfig
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import encode
from rayembed.models.export import max_seq_length
from rayembed.models.pair_scorer import PairScorer
from rayembed.models.pairs import trained_reading
from rayembed.models.rerankers import Reranker

TOKENS_PER_BATCH = 4096


def probe(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], experiment: Experiment
) -> NDArray[np.float32]:
    """What the model gives in float32, of texts as they are, without instructions, cut to the exported model's length.

    Args:
        model: an embedder or a pair scorer.
        tokenizer: of the model.
        pairs: N queries, each with a passage.
        experiment: lengths.

    Returns:
        An embedder's vectors [2 N, D] of each query and its passage; a reranker's scores [N].
    """
    how: dict[str, Any] = {"tokens_per_batch": TOKENS_PER_BATCH, "dtype": torch.float32}
    if isinstance(model, PairScorer):
        return Reranker(model, tokenizer, trained_reading(experiment)).score(pairs, **how)
    assert isinstance(model, Embedder)
    return encode(
        model, tokenizer, [text for pair in pairs for text in pair], max_len=max_seq_length(experiment), **how
    )


def reranker_section(experiment: Experiment, model: str) -> ScoreConfig:
    """A reranker of the experiment's family as a teacher; how it reads pairs is told by `trained_reading`."""
    return ScoreConfig(
        model=model,
        kind="decoder-reranker" if experiment.model.family == "reranker-decoder" else "reranker",
        trust_remote_code=experiment.model.trust_remote_code,
    )


def write_probe(folder: Path, pairs: Sequence[tuple[str, str]], found: NDArray[np.float32]) -> None:
    """Keeps pairs and what the model gives as probe.json and probe.npy."""
    (folder / "probe.json").write_text(json.dumps(list(pairs), ensure_ascii=False))
    np.save(folder / "probe.npy", found)


def read_probe(folder: Path) -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """What `write_probe` kept.

    Raises:
        FileNotFoundError: the folder holds no probe.
    """
    pairs = [(query, passage) for query, passage in json.loads((folder / "probe.json").read_text())]
    return pairs, np.load(folder / "probe.npy")


def least_cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """The smallest cosine between rows of the same number: 1 where vectors point the same way."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float((np.sum(first.astype(np.float64) * second, axis=1) / norms).min())
