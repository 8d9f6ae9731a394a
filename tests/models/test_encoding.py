"""Texts to vectors in order and within 16-bit rounding."""

import inspect
import json
import logging
import statistics
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rayembed.config.model import ModelConfig
from rayembed.models.encoding import (
    encode,
    resolve_dtype,
    resolve_tokens_per_batch,
    tokenize,
)
from rayembed.models.loading import load_embedder, load_tokenizer
from rayembed.models.probe import least_cosine


def docstrings(module: ModuleType) -> list[str]:
    """What a module's functions and classes say of themselves."""
    values = [value for name, value in sorted(vars(module).items()) if callable(value) and not name.startswith("_")]
    return [text for value in values if (text := inspect.getdoc(value))]


CPU = torch.device("cpu")
TEXTS = ["a cat", "dogs bark at night", "", "the 7 seas; and more", "z", "long " * 30, "a cat"]
SENTENCES = [
    "How are genetic conditions treated?",
    "Diabetes is a disease in which your blood glucose, or blood sugar, levels are too high. " * 4,
    "numpy.linalg.norm(x, ord=None)",
    "Return the sum of array elements over a given axis.",
    "x",
    *(text for module in (json, logging, statistics) for text in docstrings(module)),
]


def test_vectors_come_in_the_order_of_the_texts(tiny_model: Path) -> None:
    model = load_embedder(ModelConfig(name_or_path=str(tiny_model)))
    tokenizer = load_tokenizer(str(tiny_model), padding_side="right")
    together = encode(model, tokenizer, TEXTS, max_len=32, tokens_per_batch=40, dtype=torch.float32)
    alone = [encode(model, tokenizer, [t], max_len=32, tokens_per_batch=4096, dtype=torch.float32) for t in TEXTS]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together[0], together[-1], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_no_texts_give_no_vectors(tiny_model: Path) -> None:
    model = load_embedder(ModelConfig(name_or_path=str(tiny_model)))
    tokenizer = load_tokenizer(str(tiny_model), padding_side="right")
    assert encode(model, tokenizer, [], max_len=32, tokens_per_batch=64, dtype=torch.float32).shape == (0, 64)


def test_texts_are_cut_with_their_special_tokens(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), padding_side="right")
    (ids,) = tokenize(tokenizer, ["abcdefghij"], 6)
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "##b", "##c", "##d", "[SEP]"]


def test_bfloat16_keeps_the_direction_on_a_real_model(minilm: str) -> None:
    model = load_embedder(ModelConfig(name_or_path=minilm))
    tokenizer = load_tokenizer(minilm, padding_side="right")
    full, half = (
        encode(model, tokenizer, SENTENCES, max_len=128, tokens_per_batch=4096, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert len(SENTENCES) >= 64
    assert least_cosine(full, half) >= 0.9999
    assert np.abs(full - half).max() > 1e-6  # bfloat16 was in force
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)  # normalised in float32


def test_the_arithmetic_type_and_batch_suit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("float16", CPU) == torch.float16
    for there, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {"avx512_bf16": there})
        assert resolve_dtype("auto", CPU) == expected
    assert resolve_tokens_per_batch(128, CPU) == 128
    assert resolve_tokens_per_batch(None, torch.device("cuda")) > resolve_tokens_per_batch(None, CPU)
