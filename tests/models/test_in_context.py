"""Queries of in-context-learning embedders as token ids, by hand and as FlagEmbedding's inference reads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rayembed.config.families import ExampleConfig, IclConfig
from rayembed.config.model import ModelConfig
from rayembed.models.decoders import append_eos
from rayembed.models.encoding import encode_ids
from rayembed.models.in_context import QueryReader
from rayembed.models.loading import load_embedder, tokenizer_of
from tests.models.tiny_decoders import llama3_tokenizer, mistral_tokenizer, qwen_tokenizer, tiny_decoder

TOKENIZERS = {"Qwen2": qwen_tokenizer, "Llama": llama3_tokenizer, "Mistral": mistral_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return append_eos(TOKENIZERS[request.param]())


def reader(tokenizer: PreTrainedTokenizerBase, **settings: object) -> QueryReader:
    return QueryReader(tokenizer, IclConfig(**{"icl_suffix_str": ".to,", **settings}))  # type: ignore[arg-type]


def test_a_query_is_cut_and_its_suffix_and_end_are_not(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = reader(tokenizer)
    first = len(tokenizer("x")["input_ids"]) - 2  # tokens before a text
    for length in (first + 6, first + 9, 40):
        (ids,) = whole.tokens(["abcdefgh"], length, ["ex.ample,"])
        kept = "abcdefgh"[: length - first - 1 - 4]
        (expected,) = tokenizer([f"ex.ample,{kept}.to,"])["input_ids"]
        assert ids == expected
        assert len(ids) == first + len("ex.ample,") + len(kept) + 4 + 1
    with pytest.raises(ValueError, match=r"data\.query_max_len"):
        whole.tokens(["abcdefgh"], first + 5)


def test_a_text_of_several_bytes_a_character_is_cut_at_a_character() -> None:
    spans = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]  # of a character of three bytes in the middle

    class Bytes:
        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[tuple[int, int]]]]:
            return {"offset_mapping": [spans for _ in texts]}

    whole = QueryReader(Bytes(), IclConfig())  # type: ignore[arg-type]
    assert [whole.cut(["a…b"], length)[0] for length in (1, 2, 4, 5, 9)] == ["a", "a…", "a…", "a…b", "a…b"]


def test_examples_are_cut_and_joined_while_they_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    few = reader(tokenizer, example_query_max_len=4, example_passage_max_len=5, examples_max_len=32)
    short = few.shortened([("abcdef", "ghijklm"), ("ab", "cd"), ("x", "y")])
    assert short == ["abcd.to,ghijk\n\n", "ab.to,cd\n\n", "x.to,y\n\n"]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in short]
    for limit in (8, sum(lengths[:1]), sum(lengths[:2]) - 1, sum(lengths[:2]), sum(lengths)):
        fits = [n for n in range(4) if sum(lengths[:n]) <= limit][-1]
        assert reader(tokenizer, examples_max_len=limit).joined(short) == "".join(short[:fits])


def test_a_written_line_break_is_one() -> None:
    assert QueryReader(llama3_tokenizer(), IclConfig()).suffix == "\n<response>"


@pytest.mark.parity
@pytest.mark.parametrize("architecture", TOKENIZERS)
def test_vectors_of_queries_are_those_of_flag_icl_model(architecture: str, tmp_path: Path) -> None:
    from FlagEmbedding import FlagICLModel

    tiny_decoder(architecture).save_pretrained(tmp_path)
    append_eos(TOKENIZERS[architecture]()).save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path), family="icl")
    examples = [{"query": "what is a", "response": "the letter a"}, {"instruct": "Say.", "query": "b", "response": "c"}]
    icl = IclConfig(icl_suffix_str=".to,", examples_for_task=[ExampleConfig(**example) for example in examples])
    model, tokenizer = load_embedder(config), tokenizer_of(config)
    own = QueryReader(tokenizer, icl)
    before = own.written([("Find.what is a", "the letter a"), ("Say.b", "c")])
    queries = ["short", "a longer query that is cut before it is at its end", ""]
    texts = [f"Find.{query}" for query in queries]
    ids = own.tokens(texts, 24, ["".join(before)] * 3)
    found = encode_ids(model, tokenizer, ids, tokens_per_batch=4096, dtype=torch.float32)
    theirs = FlagICLModel(
        str(tmp_path),
        use_fp16=False,
        devices="cpu",
        query_instruction_for_retrieval="Find.",
        query_instruction_format="{}{}",
        suffix=".to,",
        examples_for_task=examples,
        examples_instruction_format="{}{}.to,{}",
    )
    special = len(tokenizer("")["input_ids"])
    counted = sum(len(theirs.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("<s>", "</s>"))
    expected = theirs.encode_queries(queries, max_length=24 - special + counted)  # it counts both as texts
    np.testing.assert_allclose(found, expected, atol=1e-5)
