"""Rerankers' scores equal transformers' own pair by pair, in order, however pairs are batched and cut."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import decoders
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rayembed.config.score import ScoreConfig
from rayembed.models.loading import teacher_kind
from rayembed.models.pairs import PROMPT
from rayembed.models.rerankers import check_pair_length, load_reranker
from tests.conftest import tiny_tokenizer
from tests.small_models import decoder_folder

CPU = torch.device("cpu")
PAIRS = [
    ("what is it", "a thing"),
    ("why", "because " * 20),
    ("q", "p"),
    ("what is it", "another thing, longer"),
    ("some query", "text " * 9),
]
LONG_QUERY, LONG_PASSAGE = "word seven " * 20, "a long one " * 40
CUT = [(LONG_QUERY, "a short one"), ("why", LONG_PASSAGE), (LONG_QUERY, LONG_PASSAGE), (LONG_QUERY[:44], LONG_PASSAGE)]


@pytest.fixture(scope="module")
def cross_encoder(reranker_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder whose tokenizer gives token types and puts tokens together to words again, as BERT's do."""
    folder = shutil.copytree(reranker_folder, tmp_path_factory.mktemp("cross-encoder") / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment] # typed as read-only
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("llama") / "model", "llama", "[CLS]")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("gpt2") / "model", "gpt2", None)


def scored(
    folder: Path, pairs: list[tuple[str, str]], max_len: int, tokens_per_batch: int = 4096, **settings: str | None
) -> NDArray[np.float32]:
    config = ScoreConfig(model=str(folder), max_len=max_len, **settings)  # type: ignore[arg-type] # all of these settings are texts
    kind = "reranker" if (folder / "config.json").read_text().count("ForSequenceClassification") else "decoder-reranker"
    reranker = load_reranker(config, kind, device=CPU)
    return reranker.score(pairs, tokens_per_batch=tokens_per_batch, dtype=torch.float32)


@torch.inference_mode()
def of_ids(folder: Path, query: list[int], passage: list[int]) -> float:
    """What transformers gives for one pair of token ids in the layout of tiny_tokenizer, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    first = [tokenizer.cls_token_id, *query, tokenizer.sep_token_id]
    second = [*passage, tokenizer.sep_token_id]
    types = [[0] * len(first) + [1] * len(second)]
    return float(model(input_ids=torch.tensor([first + second]), token_type_ids=torch.tensor(types)).logits)


def cut_ids(folder: Path, pair: tuple[str, str], max_len: int) -> tuple[list[int], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    query, passage = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)
    query = query[: max_len * 3 // 4]
    return query, passage[: max_len - 3 - len(query)]


@pytest.mark.parametrize("tokens_per_batch", [64, 150, 4096])
def test_scores_equal_transformers_own_in_order(cross_encoder: Path, tokens_per_batch: int) -> None:
    expected = [of_ids(cross_encoder, *cut_ids(cross_encoder, pair, 64)) for pair in PAIRS]
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(scored(cross_encoder, PAIRS, 64, tokens_per_batch), expected, atol=1e-5)


def test_a_query_is_cut_to_three_quarters_and_then_the_passage(cross_encoder: Path) -> None:
    expected = [of_ids(cross_encoder, *cut_ids(cross_encoder, pair, 64)) for pair in CUT]
    assert [len(cut_ids(cross_encoder, pair, 64)[0]) for pair in CUT] == [48, 3, 48, 36]
    np.testing.assert_allclose(scored(cross_encoder, CUT, 64), expected, atol=1e-5)


def test_the_shortest_limit_leaves_the_passage_a_token(cross_encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    query, passage = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in CUT[2])
    expected = of_ids(cross_encoder, query[:4], passage[:1])
    np.testing.assert_allclose(scored(cross_encoder, [CUT[2]], 8), [expected], atol=1e-5)


def test_instructions_are_put_before_both_texts(cross_encoder: Path) -> None:
    told = {"query_instruction_for_rerank": "A: ", "passage_instruction_for_rerank": "B: "}
    written = [(f"A: {query}", f"B: {passage}") for query, passage in PAIRS]
    np.testing.assert_array_equal(scored(cross_encoder, PAIRS, 64, **told), scored(cross_encoder, written, 64))


def test_a_tokenizer_without_offsets_cuts_by_tokens(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(cross_encoder, CUT, 64)
    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(cross_encoder)), "is_fast", False)
    np.testing.assert_allclose(scored(cross_encoder, CUT, 64), expected, atol=1e-5)


@pytest.mark.parametrize("folder", ["cross_encoder", "llama"])
def test_no_pairs_have_no_scores(folder: str, request: pytest.FixtureRequest) -> None:
    assert scored(request.getfixturevalue(folder), [], 64).shape == (0,)


@pytest.mark.parametrize("folder", ["cross_encoder", "llama"])
def test_nothing_is_logged_for_a_batch(
    folder: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scored(request.getfixturevalue(folder), [*PAIRS, *CUT], 64, 64)
    assert not caplog.records


def test_a_classifier_of_two_labels_is_no_teacher(two_label_folder: Path) -> None:
    with pytest.raises(ValueError, match="has 2 labels; a reranker has one score, choose another model"):
        scored(two_label_folder, PAIRS, 64)


@torch.inference_mode()
def yes_logits(folder: Path, pairs: list[tuple[str, str]], max_len: int, prompt: str = PROMPT) -> list[float]:
    """The logit of "Yes" after each pair alone, by the layout in words: no padding, all logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    begin = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    limit = max_len + len(ids("\n")) + len(ids(prompt))
    found = []
    for query, passage in pairs:
        pair = begin + ids(query)[: max_len * 3 // 4] + ids("\n") + ids(passage)[:max_len]
        text = torch.tensor([pair[:limit] + ids("\n") + ids(prompt)])
        found.append(float(model(text).logits[0, -1, ids("Yes")[0]]))
    return found


@pytest.mark.parametrize("tokens_per_batch", [64, 700, 8192])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_gives_the_logit_of_yes_however_it_is_batched(
    kind: str, tokens_per_batch: int, request: pytest.FixtureRequest
) -> None:
    folder, pairs = request.getfixturevalue(kind), [*PAIRS, *CUT]
    expected = yes_logits(folder, pairs, 64)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(scored(folder, pairs, 64, tokens_per_batch), expected, atol=1e-5)


def test_a_decoder_reads_the_prompt_of_the_settings(llama: Path) -> None:
    found = scored(llama, PAIRS, 64, prompt="Is B about A?")
    np.testing.assert_allclose(found, yes_logits(llama, PAIRS, 64, "Is B about A?"), atol=1e-5)


def test_a_decoder_computes_logits_of_one_position(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScoreConfig(model=str(llama), max_len=64)
    reranker = load_reranker(config, "decoder-reranker", device=CPU)
    shapes, model = [], reranker.scorer.backbone
    model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape[:2])))  # type: ignore[union-attr, operator]
    reranker.score(PAIRS, tokens_per_batch=8192, dtype=torch.float32)
    assert shapes == [(len(PAIRS), 1)]


def test_a_decoder_without_room_for_its_prompt_is_refused(llama: Path, reranker_folder: Path) -> None:
    prompt = len(AutoTokenizer.from_pretrained(llama)(PROMPT, add_special_tokens=False)["input_ids"])
    room = 512 - 2 * prompt
    check_pair_length(ScoreConfig(model=str(llama), max_len=room), "decoder-reranker")
    with pytest.raises(ValueError, match=r"score\.max_len with the prompt twice is 513, but .* at most 512 tokens"):
        check_pair_length(ScoreConfig(model=str(llama), max_len=room + 1), "decoder-reranker")
    check_pair_length(ScoreConfig(model=str(reranker_folder), max_len=128), "reranker")
    with pytest.raises(ValueError, match=r"score\.max_len is 129, but"):
        check_pair_length(ScoreConfig(model=str(reranker_folder), max_len=129), "reranker")


def test_the_kind_of_a_teacher_is_known_by_its_class_and_files(
    reranker_folder: Path, tiny_model: Path, llama: Path, tmp_path: Path
) -> None:
    embedder = shutil.copytree(llama, tmp_path / "decoder that embeds")
    (embedder / "modules.json").write_text("[]")
    kinds = [teacher_kind(str(folder)) for folder in (reranker_folder, llama, embedder, tiny_model)]
    assert kinds == ["reranker", "decoder-reranker", "embedder", "embedder"]


@pytest.mark.parity
@pytest.mark.parametrize("instructions", [(None, None), ("A: ", None), ("A: ", "B: ")])
def test_scores_equal_those_of_flagembeddings_reranker(
    cross_encoder: Path, instructions: tuple[str | None, str | None]
) -> None:
    """compute_score over all pairs at once is what its add_reranker_score.py does."""
    from FlagEmbedding import FlagReranker

    told = dict(zip(("query_instruction_for_rerank", "passage_instruction_for_rerank"), instructions, strict=True))
    theirs = FlagReranker(str(cross_encoder), use_fp16=False, max_length=64, devices="cpu", **told)
    pairs = [*PAIRS, *CUT]
    expected = theirs.compute_score(pairs, batch_size=3)
    np.testing.assert_allclose(scored(cross_encoder, pairs, 64, 300, **told), expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("prompt", [None, "Is B about A?"])
@pytest.mark.parametrize("bos", ["[CLS]", None])
def test_scores_equal_those_of_flagembeddings_decoder(tmp_path: Path, bos: str | None, prompt: str | None) -> None:
    from FlagEmbedding import FlagLLMReranker

    folder = decoder_folder(tmp_path / "model", "llama", bos)
    theirs = FlagLLMReranker(str(folder), use_fp16=False, max_length=64, devices="cpu", prompt=prompt)
    pairs = [*PAIRS, *CUT]
    expected = theirs.compute_score(pairs, batch_size=3)
    told = {"query_instruction_for_rerank": "A: ", "passage_instruction_for_rerank": "B: ", "prompt": prompt}
    np.testing.assert_allclose(scored(folder, pairs, 64, 700, **told), expected, atol=1e-5)
