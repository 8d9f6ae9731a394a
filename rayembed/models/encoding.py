"""Many texts to vectors, or pairs to a reranker's scores, without gradients: sorted by length, batched by tokens."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rayembed.models.embedder import Embedder, pad_chunks
from rayembed.models.loading import load_tokenizer, resolve

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic type for `encode.dtype`; auto is bfloat16 where the device multiplies it in hardware."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16", False) else torch.float32


def resolve_tokens_per_batch(tokens: int | None, device: torch.device) -> int:
    """`encode.tokens_per_batch`, or what suits the device: on 2 CPU cores 4096 encoded a third faster than 16384."""
    return tokens or (65536 if device.type == "cuda" else 4096)


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision for a forward pass; none for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_len: int) -> list[list[int]]:
    """Token ids with special tokens, cut to `max_len`."""
    ids: list[list[int]] = tokenizer(
        list(texts), truncation=True, max_length=max_len, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    return ids


@torch.inference_mode()
def encode(
    model: Embedder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_len: int,
    tokens_per_batch: int,
    dtype: torch.dtype,
) -> NDArray[np.float32]:
    """Vectors [N, D] of N texts, in their order; pooled and normalised in float32 whatever the arithmetic type."""
    device = next(model.parameters()).device
    if not texts:
        settings: Any = model.backbone.config
        return np.zeros((0, int(settings.hidden_size)), np.float32)
    batch = pad_chunks(
        tokenize(tokenizer, texts, max_len),
        pad_token=int(tokenizer.pad_token_id),
        padding_side=tokenizer.padding_side,
        tokens_per_chunk=tokens_per_batch,
    ).to(device)
    with autocast(dtype, device):
        vectors: Tensor = model.embed(batch)
    result: NDArray[np.float32] = vectors.cpu().numpy()
    return result


class Reranker:
    """A cross-encoder with one logit a (query, passage) pair."""

    def __init__(self, name_or_path: str, *, device: torch.device, trust_remote_code: bool = False) -> None:
        folder = resolve(name_or_path)
        self.tokenizer = load_tokenizer(name_or_path, padding_side="right", trust_remote_code=trust_remote_code)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"{name_or_path} has {self.model.config.num_labels} labels; a teacher has one score, set score.model "
                "to a reranker or an embedder"
            )
        self.model.eval().to(device)
        self.device = device

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[tuple[str, str]], *, max_len: int, tokens_per_batch: int, dtype: torch.dtype
    ) -> NDArray[np.float32]:
        """Raw logits [N] of N (query, passage) pairs, in their order.

        Pairs are cut to `max_len` at the passage; where the query takes more than three quarters, at both.
        """
        encoded = self._tokenize(pairs, max_len)
        scores = np.empty(len(pairs), np.float32)
        order = sorted(range(len(pairs)), key=lambda i: -len(encoded[i]["input_ids"]))
        start = 0
        while start < len(order):
            count = max(1, tokens_per_batch // len(encoded[order[start]]["input_ids"]))
            rows = order[start : start + count]
            inputs = self.tokenizer.pad([encoded[i] for i in rows], return_tensors="pt").to(self.device)
            with autocast(dtype, self.device):
                logits = self.model(**inputs).logits
            scores[rows] = logits.float().reshape(len(rows)).cpu().numpy()
            start += count
        return scores

    def _tokenize(self, pairs: Sequence[tuple[str, str]], max_len: int) -> list[dict[str, list[int]]]:
        if not pairs:
            return []
        queries = self.tokenizer([query for query, _ in pairs], add_special_tokens=False)["input_ids"]
        longest = max_len * 3 // 4 - self.tokenizer.num_special_tokens_to_add(pair=True)
        encoded: list[dict[str, list[int]]] = [{}] * len(pairs)
        for truncation, long in (("only_second", False), ("longest_first", True)):  # the first fails on a long query
            rows = [i for i, ids in enumerate(queries) if (len(ids) > longest) == long]
            if rows:
                found = self.tokenizer(
                    [pairs[i][0] for i in rows], [pairs[i][1] for i in rows], truncation=truncation, max_length=max_len
                )
                for position, row in enumerate(rows):
                    encoded[row] = {key: values[position] for key, values in found.items()}
        return encoded
