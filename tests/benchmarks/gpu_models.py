"""Models with random weights, tokenizers and texts for `gpu`: nothing is downloaded, and no data set is read.

Token t of a model is the word "wt", so that a text of words has as many tokens as words, and every tool reads the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    XLMRobertaConfig,
)

from rayembed.config.model import ModelConfig

FIRST_WORD = 10  # ids below are left to special tokens
PADDING, UNKNOWN = "[padding]", "[unknown]"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SMALL_DECODER: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
# Token counts by share of MedQuAD's texts, special tokens included: what lies between is drawn in a straight line.
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
MEDQUAD = {"queries": (7, 9, 12, 14, 17, 20, 22, 36), "passages": (15, 42, 111, 180, 206, 225, 238, 256)}


@dataclass(frozen=True)
class Kind:
    """A model by its settings."""

    settings: type[PretrainedConfig]
    large: dict[str, Any]
    small: dict[str, Any]
    family: str = "encoder"
    pooling: str = "mean"

    def config(self, *, small: bool) -> PretrainedConfig:
        return self.settings(**(self.small if small else self.large))

    def model(self, folder: Path) -> ModelConfig:
        return ModelConfig(name_or_path=str(folder), family=self.family, pooling=self.pooling)  # type: ignore[arg-type]


LARGE = "XLM-R-large"
KINDS = {
    "BERT-base": Kind(BertConfig, NO_DROPOUT, {**SMALL, **NO_DROPOUT}),
    LARGE: Kind(
        XLMRobertaConfig,
        {
            **{"vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
            **{"intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1},
            **NO_DROPOUT,
        },
        {**SMALL, **NO_DROPOUT, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1},
    ),
    "0.6B decoder": Kind(
        Qwen3Config,
        {
            **{"vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16},
            **{"intermediate_size": 3072, "num_key_value_heads": 8, "head_dim": 128, "pad_token_id": 0},
        },
        {**SMALL_DECODER, "pad_token_id": 0},
        family="decoder",
        pooling="last_token",
    ),
}
WINDOWS = "ModernBERT (sliding window)"
ARCHITECTURES = KINDS | {
    WINDOWS: Kind(
        ModernBertConfig,
        {},
        {
            **{key: value for key, value in SMALL.items() if key != "num_hidden_layers"},
            **{"num_hidden_layers": 4, "local_attention": 32, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
            **{"bos_token_id": 1, "eos_token_id": 2, "embedding_dropout": 0.0, "attention_dropout": 0.0},
        },
    )
}


@dataclass(frozen=True)
class Texts:
    """Token ids."""

    queries: list[list[int]]
    passages: list[list[int]]
    """Two a query: its positive and a negative."""

    @property
    def all(self) -> list[list[int]]:
        return self.queries + self.passages


def made(folder: Path, kind: Kind, *, small: bool) -> Path:
    """Writes a model with random weights and its tokenizer."""
    config = kind.config(small=small)
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    if small:  # such weights start so small that all texts look alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer_for(config).save_pretrained(folder)
    return folder


def tokenizer_for(config: Any) -> PreTrainedTokenizerFast:  # noqa: ANN401 - one class an architecture
    special = {config.pad_token_id: PADDING, FIRST_WORD - 1: UNKNOWN}  # no beginnings of words: they are found in them
    vocabulary = {special.get(i, word(i)): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PADDING
    )


def word(token: int) -> str:
    return f"w{token}"


def as_text(ids: Sequence[int]) -> str:
    return " ".join(map(word, ids))


def lengths(side: str, number: int, *, fixed: int | None, seed: int) -> list[int]:
    """Token counts of texts: all `fixed`, or as MedQuAD's (None)."""
    if fixed is not None:
        return [fixed] * number
    shares = np.random.default_rng([seed, len(side)]).random(number)
    return [int(length) for length in np.interp(shares, SHARES, MEDQUAD[side]).round()]


def texts(folder: Path, *, tokens: int, fixed: int | None, seed: int = 0) -> Texts:
    """Random tokens for a model: queries with two passages each, `tokens` of all of them or some more."""
    vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    draw = np.random.default_rng(seed)
    most = tokens // 3 // min(MEDQUAD["queries"]) + 1
    counts = {
        "queries": lengths("queries", most, fixed=fixed, seed=seed),
        "passages": lengths("passages", 2 * most, fixed=fixed, seed=seed),
    }
    queries, passages, total = list[list[int]](), list[list[int]](), 0

    def drawn(length: int) -> list[int]:
        found: list[int] = draw.integers(FIRST_WORD, vocabulary, length).tolist()
        return found

    while total < tokens:
        row = len(queries)
        queries.append(drawn(counts["queries"][row]))
        passages += [drawn(counts["passages"][2 * row + k]) for k in range(2)]
        total += len(queries[-1]) + len(passages[-1]) + len(passages[-2])
    return Texts(queries, passages)


def operations(backbone: Any, ids: Sequence[Sequence[int]], *, training: bool) -> float:  # noqa: ANN401
    """Of linear layers and attention, on real tokens; a causal token sees half of its text."""
    config = backbone.config
    linear = sum(
        module.weight.numel()
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("pooler")
    )
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    causal = 0.5 if isinstance(config, Qwen3Config) else 1.0
    attention = 4.0 * causal * config.num_hidden_layers * width * sum(len(text) ** 2 for text in ids)
    return float((3 if training else 1) * (2.0 * linear * sum(map(len, ids)) + attention))
