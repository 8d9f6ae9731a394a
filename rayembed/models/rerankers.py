"""(query, passage) pairs to a reranker's scores, without gradients: sorted by length, batched by tokens.

Both kinds read a pair as FlagEmbedding's inference does, so that teachers trained there give their scores here.
To add a kind: a row in KINDS, its name in config/score.py and in `teacher_kind`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayembed.config.score import ScoreConfig
from rayembed.models.embedder import pad_chunks
from rayembed.models.encoding import autocast
from rayembed.models.loading import check_length, load_tokenizer, resolve
from rayembed.models.pair_scorer import PairScorer
from rayembed.models.pairs import ANSWER, PROMPT, SEPARATOR

Pairs = Sequence[tuple[str, str]]
Encoded = tuple[list[list[int]], list[list[int]] | None]


class Reranker:
    """A model that scores pairs, with its tokenizer."""

    def __init__(self, scorer: PairScorer, tokenizer: PreTrainedTokenizerBase, config: ScoreConfig) -> None:
        self.scorer, self.tokenizer, self.config = scorer, tokenizer, config
        self._encode = encode_pairs if scorer.answer is None else encode_decoder_pairs

    @torch.inference_mode()
    def score(self, pairs: Pairs, *, max_len: int, tokens_per_batch: int, dtype: torch.dtype) -> NDArray[np.float32]:
        """Raw logits [N] of N (query, passage) pairs, in their order.

        A query is cut to three quarters of `max_len`, its passage to what is left of it (see the functions below).
        """
        if not pairs:
            return np.zeros(0, np.float32)
        ids, types = self._encode(self.tokenizer, _instructed(pairs, self.config), self.config, max_len)
        device = next(self.scorer.parameters()).device
        batch = pad_chunks(
            ids,
            types=types,
            pad_token=int(self.tokenizer.pad_token_id or 0),
            padding_side="right" if self.scorer.answer is None else "left",
            tokens_per_chunk=tokens_per_batch,
        )
        with autocast(dtype, device):
            scores: NDArray[np.float32] = self.scorer.score(batch.to(device)).cpu().numpy()
        return scores


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Pairs, config: ScoreConfig, max_len: int) -> Encoded:
    """Token ids and types of a cross-encoder's pairs: the query has at most 3/4 of `max_len`, the passage the rest."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = min(max_len * 3 // 4, max_len - special - 1)  # a passage keeps a token, however small max_len is
    queries = list(dict.fromkeys(query for query, _ in pairs))
    cut = dict(zip(queries, _cut(tokenizer, queries, longest), strict=True))
    found = tokenizer(
        [cut[query] for query, _ in pairs],
        [passage for _, passage in pairs],
        truncation="only_second",
        max_length=max_len,
    )
    return found["input_ids"], found.get("token_type_ids")


def _cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[str]:
    """The texts of the first `length` tokens: as texts, because a tokenizer pairs texts, not tokens."""
    fast = tokenizer.is_fast
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    if fast:
        ends = [offsets[length - 1][1] if len(offsets) > length else None for offsets in found["offset_mapping"]]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]
    return [
        str(tokenizer.decode(ids[:length])) if len(ids) > length else text
        for text, ids in zip(texts, found["input_ids"], strict=True)
    ]


def encode_decoder_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, config: ScoreConfig, max_len: int
) -> Encoded:
    """Token ids of a decoder's pairs, with the prompt after them.

    A query is cut to three quarters of `max_len`; the passage so that both, with a newline, have at most `max_len` and
    the prompt's length. The prompt comes after that (FlagEmbedding's FlagLLMReranker counts it twice).
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    separator, prompt = ids_of([SEPARATOR, config.prompt or PROMPT])
    bos = tokenizer.bos_token_id
    first = [] if bos is None or bos == tokenizer.pad_token_id else [bos]
    queries, passages = (
        {text: found[:length] for text, found in zip(texts, ids_of(texts), strict=True)}
        for texts, length in (
            (list(dict.fromkeys(query for query, _ in pairs)), max_len * 3 // 4),
            (list(dict.fromkeys(passage for _, passage in pairs)), max_len),
        )
    )
    longest = max_len + len(separator) + len(prompt)
    return [
        (first + queries[query] + separator + passages[passage])[:longest] + separator + prompt
        for query, passage in pairs
    ], None


def answer_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token whose logit is a decoder's score."""
    return int(tokenizer(ANSWER, add_special_tokens=False)["input_ids"][0])


@dataclass(frozen=True)
class Kind:
    """What differs between kinds of rerankers."""

    auto_class: str
    """Of transformers."""

    check: Callable[[str, Any], None]
    """Refuses a model that cannot score; given its name."""

    answers: bool
    """A decoder that answers, not a classifier."""


def check_labels(name: str, backbone: nn.Module) -> None:
    """Refuses a classifier of more than one label."""
    labels = int(getattr(backbone.config, "num_labels", 1))
    if labels != 1:
        raise ValueError(
            f"{name} has {labels} labels; a teacher has one score, set score.model to a reranker or an embedder"
        )


def check_last_logits(name: str, backbone: nn.Module) -> None:
    """Refuses a language model that computes logits of all tokens: they would take more memory than the model."""
    if "logits_to_keep" not in inspect.signature(backbone.forward).parameters:
        raise ValueError(
            f"{name}: its code ({type(backbone).__name__}) computes no logits of the last token alone "
            "(logits_to_keep); set score.model to another teacher, or score.trust_remote_code: false"
        )


KINDS = {
    "reranker": Kind("AutoModelForSequenceClassification", check_labels, answers=False),
    "decoder-reranker": Kind("AutoModelForCausalLM", check_last_logits, answers=True),
}


def load_reranker(config: ScoreConfig, kind: str, *, device: torch.device) -> Reranker:
    """The teacher of section score; `kind` is a key of KINDS.

    Raises:
        ValueError: the model cannot give one score a pair.
    """
    facts, remote = KINDS[kind], config.trust_remote_code
    backbone: nn.Module = getattr(transformers, facts.auto_class).from_pretrained(
        resolve(config.model), dtype=torch.float32, trust_remote_code=remote
    )
    facts.check(config.model, backbone)
    tokenizer: PreTrainedTokenizerBase = (
        AutoTokenizer.from_pretrained(resolve(config.model), trust_remote_code=remote)
        if facts.answers  # it may have no padding token: padded positions are masked, whatever stands there
        else load_tokenizer(config.model, padding_side="right", trust_remote_code=remote)
    )
    scorer = PairScorer(backbone, answer=answer_token(tokenizer) if facts.answers else None)
    return Reranker(scorer.eval().to(device), tokenizer, config)


def check_pair_length(config: ScoreConfig, kind: str, name: str = "score.max_len") -> None:
    """Refuses a length of pairs that the model has no positions for, a decoder's prompt included; `name`: its setting.

    Raises:
        ValueError: names the setting and the longest text that the model can read.
    """
    length = config.max_len
    if KINDS[kind].answers:
        tokenizer = AutoTokenizer.from_pretrained(resolve(config.model), trust_remote_code=config.trust_remote_code)
        texts = [SEPARATOR, config.prompt or PROMPT]
        length += 2 * sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    setting = name if length == config.max_len else f"{name} with the prompt twice"
    check_length(config.model, length, setting, trust_remote_code=config.trust_remote_code)


def _instructed(pairs: Pairs, config: ScoreConfig) -> list[tuple[str, str]]:
    query, passage = config.query_instruction_for_rerank or "", config.passage_instruction_for_rerank or ""
    return [(query + own, passage + text) for own, text in pairs]
