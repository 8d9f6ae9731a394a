"""A reranker that was trained here reads pairs after its training as in it; other ones as FlagEmbedding's inference."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.score import ScoreConfig
from rayembed.models.encoding import tokenize
from rayembed.models.pairs import PROMPT, PairReading, pair_layout, trained_reading
from rayembed.models.rerankers import (
    Reranker,
    check_classifier,
    check_pair_length,
    encode_trained_pairs,
    load_reranker,
    teacher_reading,
)
from rayembed.models.settings_file import write_settings
from rayembed.models.trained import build_model, build_tokenizer, save_model
from tests.models.test_pairs import flag_dataset
from tests.small_models import decoder_folder

Ids = list[list[int]]
KINDS = {"reranker-encoder": "reranker", "reranker-decoder": "decoder-reranker"}
LENGTHS = {"reranker-encoder": (8, 20), "reranker-decoder": (16, 60)}
ASKED = "is b about a?"  # 10 tokens
WORDS = [("abc" * n)[:n] for n in (2, 7, 12, 13, 14, 40, 90)]  # a token a letter
PAIRS = [(query, passage) for query in WORDS for passage in WORDS]


@pytest.fixture(scope="module")
def bases(reranker_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "reranker-encoder": reranker_folder,
        "reranker-decoder": decoder_folder(tmp_path_factory.mktemp("llama") / "model", "llama", "[CLS]"),
    }


def experiment_of(family: str, base: Path, **sections: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
    lengths = dict(zip(("query_max_len", "passage_max_len"), LENGTHS[family], strict=True))
    told = {"reranker": {"prompt": ASKED}} if family == "reranker-decoder" else {}
    own = {"name_or_path": str(base), "family": family, **sections}
    return Experiment(output_dir="unused", model=own, data=lengths, **told)  # type: ignore[arg-type] # by pydantic


def by_the_rule(tokenizer: PreTrainedTokenizerBase, family: str, query: str, passage: str) -> list[int]:
    """Token by token, in the words of FlagEmbedding's training."""
    long_query, long_passage = LENGTHS[family]
    asked, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (query, passage))
    asked, answer = asked[: long_query + long_passage // 4], answer[: long_passage + long_query // 2]
    if family == "reranker-encoder":
        while len(asked) + len(answer) + 3 > long_query + long_passage:
            answer = answer[:-1]
        return [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id, *answer, tokenizer.sep_token_id]
    separator, prompt = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", ASKED))
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id != tokenizer.pad_token_id else []
    while len([*begin, *asked, *separator, *answer, *separator, *prompt]) > long_query + long_passage:
        answer = answer[:-1]
    return [*begin, *asked, *separator, *answer, *separator, *prompt]


def fed(reranker: Reranker, pairs: list[tuple[str, str]]) -> Ids:
    """Token ids of each pair that the model itself is given."""
    found: Ids = []

    def spy(batch: Any) -> torch.Tensor:  # noqa: ANN401 - a TokenBatch
        rows = [row[mask.bool()].tolist() for chunk in batch.chunks for row, mask in zip(chunk.ids, chunk.mask)]  # noqa: B905
        found.extend(rows[place] for place in batch.order)
        return torch.zeros(len(rows))

    reranker.scorer.score = spy  # type: ignore[method-assign]
    reranker.score(pairs, tokens_per_batch=512, dtype=torch.float32)
    return found


def in_training(experiment: Experiment) -> Ids:
    """As jobs/tokenize.py and training/batches.py make them."""
    tokenizer = build_tokenizer(experiment)
    layout = pair_layout(tokenizer, experiment)

    def ids(text: str, length: int) -> list[int]:
        return tokenize(tokenizer, [text], length, special_tokens=False)[0]

    return [
        layout.pack(ids(query, layout.query_max_len), ids(passage, layout.passage_max_len))[0]
        for query, passage in PAIRS
    ]


@pytest.mark.parametrize("family", KINDS)
def test_long_and_short_pairs_are_read_after_training_as_in_it(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    experiment = experiment_of(family, bases[family])
    save_model(build_model(experiment), build_tokenizer(experiment), experiment, tmp_path / "model")
    expected = in_training(experiment)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert expected == [by_the_rule(tokenizer, family, *pair) for pair in PAIRS]
    assert max(map(len, expected)) == sum(LENGTHS[family])
    config, device = ScoreConfig(model=str(tmp_path / "model")), torch.device("cpu")
    by_file = load_reranker(config, KINDS[family], device=device)
    evaluated = load_reranker(config, KINDS[family], device=device, reading=trained_reading(experiment))
    assert by_file.reading == trained_reading(experiment)
    assert fed(by_file, PAIRS) == fed(evaluated, PAIRS) == expected
    base = ScoreConfig(model=str(bases[family]))
    assert (
        fed(load_reranker(base, KINDS[family], device=device, reading=trained_reading(experiment)), PAIRS) == expected
    )
    foreign = PairReading(max_len=sum(LENGTHS[family]), prompt=ASKED)
    assert fed(load_reranker(config, KINDS[family], device=device, reading=foreign), PAIRS) != expected


def test_a_decoder_whose_first_token_pads_begins_as_in_training(tmp_path: Path) -> None:
    """GPT-2's only special token is its bos, and in training its padding: then none is put before a pair."""
    folder = decoder_folder(tmp_path / "base", "gpt2", "[SEP]")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(folder)
    experiment = experiment_of("reranker-decoder", folder)
    expected = in_training(experiment)
    reading = trained_reading(experiment)
    reranker = load_reranker(
        ScoreConfig(model=str(folder)), "decoder-reranker", device=torch.device("cpu"), reading=reading
    )
    assert fed(reranker, PAIRS) == expected
    assert expected[0][0] != tokenizer.bos_token_id


@pytest.mark.parametrize("family", KINDS)
def test_scores_have_the_types_of_training(family: str, bases: dict[str, Path]) -> None:
    tokenizer = build_tokenizer(experiment_of(family, bases[family]))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    layout = pair_layout(tokenizer, experiment_of(family, bases[family]))
    _, types = encode_trained_pairs(tokenizer, layout, [("ab", "c"), ("a", "bc")])
    assert types == ([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]] if family == "reranker-encoder" else None)


@pytest.fixture(scope="module")
def folder(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder reranker as it was trained, with an instruction that has text on both sides."""
    made = shutil.copytree(bases["reranker-decoder"], tmp_path_factory.mktemp("told") / "model")
    forms = {"query_instruction_for_retrieval": "A", "query_instruction_format": r"{}:\n{}!"}
    write_settings(experiment_of("reranker-decoder", made, **forms), made)
    return made


def test_section_score_goes_before_what_the_folder_says(folder: Path) -> None:
    told = teacher_reading(ScoreConfig(model=str(folder)))
    assert (told.trained, told.max_len, told.prompt) == ((16, 60), 76, ASKED)
    assert told.texts([("q{}", "p")]) == [("A:\nq{}!", "p")]
    other = ScoreConfig(
        model=str(folder),
        prompt="b?",
        max_len=30,
        query_instruction_for_rerank="",
        passage_instruction_for_rerank="B: ",
    )
    found = teacher_reading(other)
    assert (found.trained, found.max_len, found.prompt) == (None, 30, "b?")
    assert found.texts([("q", "p")]) == [("q", "B: p")]


def test_a_reranker_of_others_is_read_as_flagembedding_does(bases: dict[str, Path]) -> None:
    config = ScoreConfig(model=str(bases["reranker-decoder"]), query_instruction_for_rerank="A: ")
    assert teacher_reading(config) == PairReading(max_len=512, prompt=PROMPT, query_instruction="A: ")


def test_an_embedders_file_says_nothing_of_pairs(bases: dict[str, Path], tmp_path: Path) -> None:
    made = shutil.copytree(bases["reranker-encoder"], tmp_path / "model")
    write_settings(experiment_of("reranker-encoder", made), made)
    assert teacher_reading(ScoreConfig(model=str(made))).trained == (8, 20)
    text = (made / "rayembed.json").read_text()
    (made / "rayembed.json").write_text(text.replace("reranker-encoder", "encoder"))
    assert teacher_reading(ScoreConfig(model=str(made))) == PairReading(max_len=512)


def test_the_prompt_of_training_is_part_of_the_length(bases: dict[str, Path]) -> None:
    config = ScoreConfig(model=str(bases["reranker-decoder"]))  # reads 512 tokens
    check_pair_length(config, "decoder-reranker", "both", reading=PairReading(max_len=512, trained=(112, 400)))
    with pytest.raises(ValueError, match=r"both is 513, but .* at most 512 tokens"):
        check_pair_length(config, "decoder-reranker", "both", reading=PairReading(max_len=513, trained=(113, 400)))
    with pytest.raises(ValueError, match="leave no room for the passage"):
        check_pair_length(config, "decoder-reranker", "both", reading=PairReading(max_len=24, trained=(8, 16)))


def test_a_classifier_of_several_labels_is_no_base_of_a_reranker(
    two_label_folder: Path, bases: dict[str, Path], tiny_model: Path
) -> None:
    with pytest.raises(
        ValueError, match="is a classifier of 2 labels; a reranker has one score: choose a reranker, or"
    ):
        check_classifier(str(two_label_folder))
    check_classifier(str(bases["reranker-encoder"]))
    check_classifier(str(tiny_model))  # num_labels is 2 by default, and the head a new one


@pytest.mark.parity
@pytest.mark.parametrize("family", KINDS)
def test_pairs_after_training_are_flagembeddings_of_training(family: str, bases: dict[str, Path]) -> None:
    experiment = experiment_of(family, bases[family])
    tokenizer = build_tokenizer(experiment)
    reading, config = trained_reading(experiment), ScoreConfig(model=str(bases[family]))
    found = fed(load_reranker(config, KINDS[family], device=torch.device("cpu"), reading=reading), PAIRS)
    if family == "reranker-encoder":  # it makes texts of tokens again
        tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
        theirs = flag_dataset("AbsRerankerTrainDataset", tokenizer, LENGTHS[family], [])
        expected = [theirs.create_one_example(*pair)["input_ids"] for pair in PAIRS]
    else:
        rows = [{"query": query, "pos": [passage], "neg": ["x"], "prompt": ASKED} for query, passage in PAIRS]
        theirs = flag_dataset("AbsLLMRerankerTrainDataset", tokenizer, LENGTHS[family], rows)
        expected = [theirs[place][0][0]["input_ids"] for place in range(len(PAIRS))]
    assert found == expected
    assert np.ptp([len(ids) for ids in found]) > 20
