"""(query, passage) pairs to a reranker's scores, without gradients: sorted by length, batched by tokens.

Both kinds read a pair as FlagEmbedding's inference does, so that teachers trained there give their scores here.
To add a kind: a class with the same `score`, a row in RERANKERS, its name in config/score.py and `teacher_kind`.
"""

import inspect
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rayembed.config.score import ScoreConfig
from rayembed.models.embedder import pad_chunks
from rayembed.models.encoding import autocast
from rayembed.models.loading import check_length, load_tokenizer, resolve

SEPARATOR = "\n"
ANSWER = "Yes"
PROMPT = (  # what BGE's decoder rerankers were trained with: FlagEmbedding, inference/reranker/decoder_only/base.py
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
Pairs = Sequence[tuple[str, str]]


class Scorer(Protocol):
    """What every class of RERANKERS has."""

    def score(self, pairs: Pairs, *, max_len: int, tokens_per_batch: int, dtype: torch.dtype) -> NDArray[np.float32]:
        """Raw logits [N] of N (query, passage) pairs, in their order."""


class Reranker:
    """A cross-encoder with one logit a (query, passage) pair."""

    def __init__(self, config: ScoreConfig, *, device: torch.device) -> None:
        remote = config.trust_remote_code
        self.config, self.device = config, device
        self.tokenizer = load_tokenizer(config.model, padding_side="right", trust_remote_code=remote)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            resolve(config.model), dtype=torch.float32, trust_remote_code=remote
        )
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"{config.model} has {self.model.config.num_labels} labels; a teacher has one score, set score.model "
                "to a reranker or an embedder"
            )
        self.model.eval().to(device)

    @torch.inference_mode()
    def score(self, pairs: Pairs, *, max_len: int, tokens_per_batch: int, dtype: torch.dtype) -> NDArray[np.float32]:
        """Raw logits [N] of N (query, passage) pairs, in their order.

        A query is cut to three quarters of `max_len`, its passage to what is left of it.
        """
        encoded = self._tokenize(_instructed(pairs, self.config), max_len)
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

    def _tokenize(self, pairs: Pairs, max_len: int) -> list[dict[str, list[int]]]:
        if not pairs:
            return []
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        longest = min(max_len * 3 // 4, max_len - special - 1)  # a passage keeps a token, however small max_len is
        queries = list(dict.fromkeys(query for query, _ in pairs))
        cut = dict(zip(queries, self._cut(queries, longest), strict=True))
        found = self.tokenizer(
            [cut[query] for query, _ in pairs],
            [passage for _, passage in pairs],
            truncation="only_second",
            max_length=max_len,
        )
        return [{key: values[i] for key, values in found.items()} for i in range(len(pairs))]

    def _cut(self, texts: list[str], length: int) -> list[str]:
        """The texts of the first `length` tokens: as texts, because a tokenizer pairs texts, not tokens."""
        fast = self.tokenizer.is_fast
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        if fast:
            ends = [offsets[length - 1][1] if len(offsets) > length else None for offsets in found["offset_mapping"]]
            return [text[:end] for text, end in zip(texts, ends, strict=True)]
        return [
            str(self.tokenizer.decode(ids[:length])) if len(ids) > length else text
            for text, ids in zip(texts, found["input_ids"], strict=True)
        ]


class DecoderReranker:
    """A decoder that is asked whether the passage answers the query; its logit of "Yes" is the score."""

    def __init__(self, config: ScoreConfig, *, device: torch.device) -> None:
        self.config, self.device = config, device
        self.tokenizer = AutoTokenizer.from_pretrained(
            resolve(config.model), trust_remote_code=config.trust_remote_code
        )
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            resolve(config.model), dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
        self.model = model.eval().to(device)
        accepted = inspect.signature(self.model.forward).parameters
        if "logits_to_keep" not in accepted:  # logits of all tokens would take more memory than the model
            raise ValueError(
                f"{config.model}: its code ({type(self.model).__name__}) computes no logits of the last token alone "
                "(logits_to_keep); set score.model to another teacher, or score.trust_remote_code: false"
            )
        self._takes_positions = "position_ids" in accepted
        self._separator, self._prompt = self._ids([SEPARATOR, config.prompt or PROMPT])
        self._answer = self._ids([ANSWER])[0][0]

    @torch.inference_mode()
    def score(self, pairs: Pairs, *, max_len: int, tokens_per_batch: int, dtype: torch.dtype) -> NDArray[np.float32]:
        """Raw logits [N] of "Yes" after N (query, passage) pairs, in their order.

        A query is cut to three quarters of `max_len`; the passage so that both, with a newline, have at most `max_len`
        and the prompt's length. The prompt comes after that (FlagEmbedding's FlagLLMReranker counts it twice).
        """
        if not pairs:
            return np.zeros(0, np.float32)
        batch = pad_chunks(
            self._tokenize(_instructed(pairs, self.config), max_len),
            pad_token=int(self.tokenizer.pad_token_id or 0),
            padding_side="left",
            tokens_per_chunk=tokens_per_batch,
        )
        found = []
        for ids, mask in batch.chunks:
            with autocast(dtype, self.device):
                found.append(self._logits(ids.to(self.device), mask.to(self.device)).float().cpu())
        scores: NDArray[np.float32] = torch.cat(found)[batch.order].numpy()
        return scores

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)} if self._takes_positions else {}
        output = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False, **positions)
        logits: Tensor = output.logits[:, -1, self._answer]
        return logits

    def _tokenize(self, pairs: Pairs, max_len: int) -> list[list[int]]:
        bos = self.tokenizer.bos_token_id
        first = [] if bos is None or bos == self.tokenizer.pad_token_id else [bos]
        ids = [
            {text: found[:length] for text, found in zip(texts, self._ids(texts), strict=True)}
            for texts, length in (
                (list(dict.fromkeys(query for query, _ in pairs)), max_len * 3 // 4),
                (list(dict.fromkeys(passage for _, passage in pairs)), max_len),
            )
        ]
        longest = max_len + len(self._separator) + len(self._prompt)
        return [
            (first + ids[0][query] + self._separator + ids[1][passage])[:longest] + self._separator + self._prompt
            for query, passage in pairs
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found


RERANKERS: dict[str, type[Reranker] | type[DecoderReranker]] = {
    "reranker": Reranker,
    "decoder-reranker": DecoderReranker,
}


def load_reranker(config: ScoreConfig, kind: str, *, device: torch.device) -> Scorer:
    """The teacher of section score; `kind` is a key of RERANKERS."""
    return RERANKERS[kind](config, device=device)


def check_pair_length(config: ScoreConfig, kind: str) -> None:
    """Refuses a `score.max_len` that the teacher has no positions for, a decoder's prompt included.

    Raises:
        ValueError: names the setting and the longest text that the model can read.
    """
    length = config.max_len
    if kind == "decoder-reranker":
        tokenizer = AutoTokenizer.from_pretrained(resolve(config.model), trust_remote_code=config.trust_remote_code)
        texts = [SEPARATOR, config.prompt or PROMPT]
        length += 2 * sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    setting = "score.max_len" if length == config.max_len else "score.max_len with the prompt twice"
    check_length(config.model, length, setting, trust_remote_code=config.trust_remote_code)


def _instructed(pairs: Pairs, config: ScoreConfig) -> list[tuple[str, str]]:
    query, passage = config.query_instruction_for_rerank or "", config.passage_instruction_for_rerank or ""
    return [(query + own, passage + text) for own, text in pairs]
