"""(query, passage) pairs as token ids, laid out as rerankers are trained with them; and what a reranker is told."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.models.families import FAMILIES

PROMPT = (  # what BGE's decoder rerankers were trained with: FlagEmbedding, inference/reranker/decoder_only/base.py
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
ANSWER = "Yes"
Tokens = Sequence[int] | NDArray[np.int32]
SEPARATOR = "\n"


@dataclass(frozen=True, kw_only=True)
class PairReading:
    """How a reranker reads pairs: what is put before their texts and after both, and how long ones are cut."""

    max_len: int
    """Tokens of a pair. By FlagEmbedding's inference, a decoder's prompt comes on top."""

    trained: tuple[int, int] | None = None
    """data.query_max_len and data.passage_max_len of a model that was trained here: pairs are cut as they were there.
    None: as in FlagEmbedding's inference."""

    prompt: str = PROMPT
    """What a decoder is asked."""

    query_instruction: str | None = None
    query_instruction_format: str = "{}{}"
    passage_instruction: str | None = None
    passage_instruction_format: str = "{}{}"

    def texts(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs with their instructions."""
        query, passage = self.query_instruction_format, self.passage_instruction_format
        return [
            (_joined(query, self.query_instruction, own), _joined(passage, self.passage_instruction, other))
            for own, other in pairs
        ]


def _joined(form: str, instruction: str | None, text: str) -> str:
    return form.replace("\\n", "\n").format(instruction, text) if instruction else text


@dataclass(frozen=True)
class PairLayout:
    """What stands around query and passage, and how much of them is kept."""

    around: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Token ids before the query, between the two, and after the passage."""

    types: tuple[int, int, int, int, int] | None
    """Token types of: before, query, between, passage, after. None: the model reads none."""

    query_max_len: int
    """Tokens kept of a query."""

    passage_max_len: int
    """Tokens kept of a passage, less where the pair is longer than `max_len`."""

    max_len: int
    """Tokens of the whole."""

    def pack(self, query: Tokens, passage: Tokens) -> tuple[list[int], list[int] | None]:
        """Token ids and types of a pair; `query` and `passage` are without special tokens."""
        before, between, after = self.around
        query = query[: self.query_max_len]
        room = self.max_len - len(before) - len(query) - len(between) - len(after)
        passage = passage[: min(self.passage_max_len, room)]
        parts = (before, query, between, passage, after)
        types = None
        if self.types is not None:
            types = [kind for kind, part in zip(self.types, parts, strict=True) for _ in part]
        return [int(token) for part in parts for token in part], types


def trained_reading(experiment: Experiment) -> PairReading:
    """How the experiment's reranker reads pairs, in training and after it; their texts have their instructions."""
    lengths = experiment.data.query_max_len, experiment.data.passage_max_len
    prompt = experiment.family_sections()["reranker"].prompt or PROMPT
    return PairReading(max_len=sum(lengths), trained=lengths, prompt=prompt)


def pair_layout(tokenizer: PreTrainedTokenizerBase, experiment: Experiment) -> PairLayout:
    """The layout of the experiment's family of rerankers; see `layout_of`."""
    return layout_of(tokenizer, trained_reading(experiment), decoder=FAMILIES[experiment.model.family].causal)


def layout_of(tokenizer: PreTrainedTokenizerBase, reading: PairReading, *, decoder: bool) -> PairLayout:
    """How pairs are laid out for a reranker that was trained here, as FlagEmbedding 1.4.2 trains it.

    A query keeps a quarter of the passage's length more than data.query_max_len, a passage half of the query's more
    than data.passage_max_len, and both together, a decoder's prompt included, the sum of the two settings.

    Raises:
        ValueError: the lengths leave no room for a passage, or the tokenizer is a slow one.
    """
    assert reading.trained is not None
    query, passage = reading.trained
    around, types = _decoder_parts(tokenizer, reading.prompt) if decoder else _encoder_parts(tokenizer)
    layout = PairLayout(around, types, query + passage // 4, passage + query // 2, query + passage)
    fixed = sum(map(len, around))
    if layout.query_max_len + fixed >= layout.max_len:
        raise ValueError(
            f"data.query_max_len {query} and data.passage_max_len {passage} leave no room for the passage of a long "
            f"query ({layout.query_max_len} tokens) beside {fixed} tokens of separators and prompt; raise "
            "data.passage_max_len"
        )
    return layout


def _decoder_parts(
    tokenizer: PreTrainedTokenizerBase, prompt: str
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], None]:
    separator, asked = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (SEPARATOR, prompt))
    bos = tokenizer.bos_token_id
    before = () if bos is None or bos == tokenizer.pad_token_id else (int(bos),)
    return (before, separator, separator + asked), None


def _encoder_parts(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], tuple[int, int, int, int, int] | None]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer is a slow one ({type(tokenizer).__name__}), whose pairs cannot "
            "be laid out here; use a checkpoint with tokenizer.json"
        )
    found = tokenizer("a", "a", return_token_type_ids=True)
    ids, of = found["input_ids"], found.sequence_ids(0)
    first, last = [of.index(side) for side in (0, 1)], [len(of) - 1 - of[::-1].index(side) for side in (0, 1)]
    around = (tuple(ids[: first[0]]), tuple(ids[last[0] + 1 : first[1]]), tuple(ids[last[1] + 1 :]))
    if "token_type_ids" not in tokenizer.model_input_names:
        return around, None
    kinds = found["token_type_ids"]
    return around, (kinds[0], kinds[first[0]], kinds[last[0] + 1], kinds[first[1]], kinds[-1])
