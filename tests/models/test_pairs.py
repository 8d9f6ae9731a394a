"""Pairs are laid out as FlagEmbedding's trainers lay them out, for both kinds of rerankers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.families import RerankerConfig
from rayembed.config.model import Family, ModelConfig
from rayembed.models.loading import load_tokenizer
from rayembed.models.pairs import PROMPT, pair_layout

WORDS = "what is the cause of a headache and how can it be treated at home without medicine".split()
PAIRS = [(" ".join(WORDS[:q]), " ".join((WORDS * 4)[3 : 3 + p])) for q in (1, 5, 16) for p in (1, 9, 60)]


def experiment(family: Family, lengths: tuple[int, int], prompt: str | None = None) -> Experiment:
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none", family=family),
        data=DataConfig(query_max_len=lengths[0], passage_max_len=lengths[1]),
        reranker=RerankerConfig(prompt=prompt),
    )


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("lengths", [(8, 16), (32, 128)])
def test_a_short_pair_is_what_the_tokenizer_makes_of_it(minilm: str, lengths: tuple[int, int]) -> None:
    tokenizer = load_tokenizer(minilm, padding_side="right")
    layout = pair_layout(tokenizer, experiment("reranker-encoder", lengths))
    for query, passage in PAIRS:
        found, types = layout.pack(ids(tokenizer, query), ids(tokenizer, passage))
        whole = tokenizer(query, passage)
        cut_to = [lengths[0] + lengths[1] // 4, lengths[1] + lengths[0] // 2]
        if any(len(ids(tokenizer, text)) > most for text, most in zip((query, passage), cut_to, strict=True)):
            assert len(found) <= sum(lengths)
        elif len(whole["input_ids"]) <= sum(lengths):
            assert found == whole["input_ids"]
            assert types == whole["token_type_ids"]
    assert layout.types == (0, 0, 0, 1, 1)


def flag_args(lengths: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(
        query_max_len=lengths[0],
        passage_max_len=lengths[1],
        train_group_size=2,
        query_instruction_for_rerank=None,
        passage_instruction_for_rerank=None,
        knowledge_distillation=False,
        shuffle_ratio=0.0,
        sep_token="\n",
    )


def flag_dataset(name: str, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int], rows: list[Any]) -> Any:  # noqa: ANN401
    """FlagEmbedding's data set over rows in memory."""
    from FlagEmbedding.abc.finetune.reranker import AbsDataset

    made = object.__new__(getattr(AbsDataset, name))
    made.args, made.tokenizer, made.dataset = flag_args(lengths), tokenizer, rows
    made.max_length = sum(lengths)
    made.sep_inputs = ids(tokenizer, "\n")
    return made


@pytest.mark.parity
@pytest.mark.parametrize("lengths", [(8, 16), (10, 40)])
def test_encoders_read_pairs_as_flagembedding_packs_them(minilm: str, lengths: tuple[int, int]) -> None:
    tokenizer = load_tokenizer(minilm, padding_side="right")
    layout = pair_layout(tokenizer, experiment("reranker-encoder", lengths))
    theirs = flag_dataset("AbsRerankerTrainDataset", tokenizer, lengths, [])
    for query, passage in PAIRS:
        found, types = layout.pack(ids(tokenizer, query), ids(tokenizer, passage))
        expected = theirs.create_one_example(query, passage)
        assert found == expected["input_ids"]
        assert types == expected["token_type_ids"]
    assert layout.pack(*(ids(tokenizer, text) for text in PAIRS[-1]))[0][-1] == tokenizer.sep_token_id


@pytest.mark.parity
@pytest.mark.parametrize("bos", ["[CLS]", None])
@pytest.mark.parametrize("prompt", [None, "Is B about A?"])
def test_decoders_read_pairs_as_flagembedding_packs_them(minilm: str, bos: str | None, prompt: str | None) -> None:
    tokenizer, lengths = load_tokenizer(minilm, padding_side="left"), (12, 80)
    tokenizer.bos_token = bos
    layout = pair_layout(tokenizer, experiment("reranker-decoder", lengths, prompt))
    told = {} if prompt is None else {"prompt": prompt}
    rows = [{"query": query, "pos": [passage], "neg": ["other text"], **told} for query, passage in PAIRS]
    theirs = flag_dataset("AbsLLMRerankerTrainDataset", tokenizer, lengths, rows)
    for i, (query, passage) in enumerate(PAIRS):
        expected = theirs[i][0][0]["input_ids"]
        assert layout.pack(ids(tokenizer, query), ids(tokenizer, passage)) == (expected, None)
        assert expected[-3:] == ids(tokenizer, prompt or PROMPT)[-3:]


def test_lengths_without_room_for_the_prompt_are_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), padding_side="left")
    with pytest.raises(ValueError, match=r"data\.query_max_len 8 and data\.passage_max_len 16 leave no room .* raise"):
        pair_layout(tokenizer, experiment("reranker-decoder", (8, 16)))
