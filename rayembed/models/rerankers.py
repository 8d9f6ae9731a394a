"""(query, passage) pairs to a reranker's scores, without gradients: sorted by length, batched by tokens.

Rerankers trained elsewhere read a pair as FlagEmbedding's inference does, so that teachers give their scores of there;
those trained here read it as in their training.
To add a kind: a row in KINDS, its name in config/score.py and in `teacher_kind`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayembed.config.score import ScoreConfig
from rayembed.models.chunks import pad_chunks
from rayembed.models.encoding import autocast, tokenize
from rayembed.models.families import FAMILIES
from rayembed.models.loading import check_length, load_config, load_tokenizer, resolve
from rayembed.models.pair_scorer import PairScorer
from rayembed.models.pairs import ANSWER, PROMPT, SEPARATOR, PairLayout, PairReading, layout_of
from rayembed.models.pickles import tensors_alone
from rayembed.models.settings_file import read_settings

Pairs = Sequence[tuple[str, str]]
Encoded = tuple[list[list[int]], list[list[int]] | None]


class Reranker:
    """A model that scores pairs, with its tokenizer."""

    def __init__(self, scorer: PairScorer, tokenizer: PreTrainedTokenizerBase, reading: PairReading) -> None:
        self.scorer, self.tokenizer, self.reading = scorer, tokenizer, reading
        decoder = scorer.answer is not None
        self._encode: Callable[[Pairs], Encoded]
        if reading.trained is not None:
            self._encode = partial(encode_trained_pairs, tokenizer, layout_of(tokenizer, reading, decoder=decoder))
        elif decoder:
            self._encode = partial(encode_decoder_pairs, tokenizer, prompt=reading.prompt, max_len=reading.max_len)
        else:
            self._encode = partial(encode_pairs, tokenizer, max_len=reading.max_len)

    @torch.inference_mode()
    def score(self, pairs: Pairs, *, tokens_per_batch: int, dtype: torch.dtype) -> NDArray[np.float32]:
        """Raw logits [N] of N (query, passage) pairs, in their order."""
        if not pairs:
            return np.zeros(0, np.float32)
        ids, types = self._encode(self.reading.texts(pairs))
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


def encode_trained_pairs(tokenizer: PreTrainedTokenizerBase, layout: PairLayout, pairs: Pairs) -> Encoded:
    """Token ids and types of pairs as a reranker was trained with them."""
    queries, passages = (
        dict(zip(texts, tokenize(tokenizer, texts, length, special_tokens=False), strict=True))
        for texts, length in (
            (list(dict.fromkeys(query for query, _ in pairs)), layout.query_max_len),
            (list(dict.fromkeys(passage for _, passage in pairs)), layout.passage_max_len),
        )
    )
    packed = [layout.pack(queries[query], passages[passage]) for query, passage in pairs]
    types = [own for _, own in packed if own is not None]
    return [ids for ids, _ in packed], types or None


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Pairs, *, max_len: int) -> Encoded:
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


def encode_decoder_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Pairs, *, prompt: str, max_len: int) -> Encoded:
    """Token ids of a decoder's pairs, with the prompt after them.

    A query is cut to three quarters of `max_len`; the passage so that both, with a newline, have at most `max_len` and
    the prompt's length. The prompt comes after that (FlagEmbedding's FlagLLMReranker counts it twice).
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    separator, asked = ids_of([SEPARATOR, prompt])
    bos = tokenizer.bos_token_id
    first = [] if bos is None or bos == tokenizer.pad_token_id else [bos]
    queries, passages = (
        {text: found[:length] for text, found in zip(texts, ids_of(texts), strict=True)}
        for texts, length in (
            (list(dict.fromkeys(query for query, _ in pairs)), max_len * 3 // 4),
            (list(dict.fromkeys(passage for _, passage in pairs)), max_len),
        )
    )
    longest = max_len + len(separator) + len(asked)
    return [
        (first + queries[query] + separator + passages[passage])[:longest] + separator + asked
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
        raise ValueError(f"{name} has {labels} labels; a reranker has one score, choose another model")


def check_classifier(name: str, *, trust_remote_code: bool = False) -> None:
    """Refuses a trained classifier of more than one label by its configuration; other models get a new head.

    Raises:
        ValueError: it is one.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    trained = any(known.endswith("ForSequenceClassification") for known in config.architectures or ())
    if trained and config.num_labels != 1:
        raise ValueError(
            f"{name} is a classifier of {config.num_labels} labels; a reranker has one score: choose a reranker, or a "
            "model without a classifier, which gets a new one"
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


def teacher_reading(config: ScoreConfig) -> PairReading:
    """How the reranker of section score reads pairs: as its rayembed.json says, where the section says nothing."""
    told = read_settings(config.model) or {}
    if told and FAMILIES[told["family"]].reads != "pairs":
        told = {}
    lengths = (told["query_max_len"], told["passage_max_len"]) if told and config.max_len is None else None
    sides: dict[str, Any] = {}
    for side in ("query", "passage"):
        own = getattr(config, f"{side}_instruction_for_rerank")
        sides[f"{side}_instruction"] = told.get(f"{side}_instruction") if own is None else own
        if own is None and told:
            sides[f"{side}_instruction_format"] = told[f"{side}_instruction_format"]
    return PairReading(
        max_len=sum(lengths) if lengths else config.longest(),
        trained=lengths,
        prompt=config.prompt or told.get("prompt") or PROMPT,
        **sides,
    )


def load_reranker(
    config: ScoreConfig, kind: str, *, device: torch.device, reading: PairReading | None = None
) -> Reranker:
    """The teacher of section score.

    Args:
        config: of the model.
        kind: a key of KINDS.
        device: where it is to score.
        reading: how it reads pairs. None: as `teacher_reading` says.

    Raises:
        ValueError: the model cannot give one score a pair.
    """
    facts, remote, reading = KINDS[kind], config.trust_remote_code, reading or teacher_reading(config)
    with tensors_alone(config.model):
        backbone: nn.Module = getattr(transformers, facts.auto_class).from_pretrained(
            resolve(config.model), dtype=torch.float32, trust_remote_code=remote
        )
    facts.check(config.model, backbone)
    tokenizer = _tokenizer(config, reading, decoder=facts.answers)
    scorer = PairScorer(backbone, answer=answer_token(tokenizer) if facts.answers else None)
    return Reranker(scorer.eval().to(device), tokenizer, reading)


def _tokenizer(config: ScoreConfig, reading: PairReading, *, decoder: bool) -> PreTrainedTokenizerBase:
    remote = config.trust_remote_code
    if decoder and reading.trained is None:  # it may have no padding token: what is padded is masked
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve(config.model), trust_remote_code=remote
        )
        return tokenizer
    side = "left" if decoder else "right"  # a decoder's padding token decides whether a text begins with bos
    return load_tokenizer(config.model, padding_side=side, trust_remote_code=remote, causal=decoder)


def check_pair_length(
    config: ScoreConfig, kind: str, name: str = "score.max_len", *, reading: PairReading | None = None
) -> None:
    """Refuses a length of pairs that the model has no positions for, a decoder's prompt included.

    Args:
        config: of the model.
        kind: a key of KINDS.
        name: of the setting.
        reading: how it reads pairs. None: as `teacher_reading` says.

    Raises:
        ValueError: names the setting and the longest text that the model can read; or there is no room for a passage.
    """
    reading, decoder = reading or teacher_reading(config), KINDS[kind].answers
    length, setting = reading.max_len, name
    if reading.trained is not None:
        layout_of(_tokenizer(config, reading, decoder=decoder), reading, decoder=decoder)
    elif decoder:
        tokenizer = _tokenizer(config, reading, decoder=decoder)
        texts = [SEPARATOR, reading.prompt]
        length += 2 * sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        setting = f"{name} with the prompt twice"
    check_length(config.model, length, setting, trust_remote_code=config.trust_remote_code)
