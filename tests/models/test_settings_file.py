"""rayembed.json tells how a model reads texts; a folder without it is known by its architecture and files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.data.prompts import query_text
from rayembed.models.encoding import encode
from rayembed.models.export import save_embedder
from rayembed.models.loading import load_embedder, tokenizer_fingerprint, tokenizer_of, weights_fingerprint
from rayembed.models.pairs import PROMPT
from rayembed.models.settings_file import embedder_config, is_causal, read_settings, settings_of, write_settings
from tests.models.tiny_decoders import qwen_embedding_tokenizer, qwen_tokenizer, save_decoder, tiny_decoder

COMMON = {
    "query_instruction": "find: ",
    "query_instruction_format": "{}{} =",
    "passage_instruction": None,
    "passage_instruction_format": "{}{}",
    "query_max_len": 24,
    "passage_max_len": 40,
}
TOLD = {"query_instruction_for_retrieval": "find: ", "query_instruction_format": "{}{} ="}


def experiment_of(base: Path | str, family: str, **sections: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
    own = {"name_or_path": str(base), "family": family, **TOLD, **sections.pop("model", {})}
    lengths = {"query_max_len": 24, "passage_max_len": 40}
    return Experiment(output_dir="unused", model=own, data=lengths, **sections)  # type: ignore[arg-type] # by pydantic


def st_files(folder: Path, pooling: str) -> Path:
    """What sentence-transformers writes beside a model."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_what_a_family_was_trained_with_is_told(tiny_model: Path) -> None:
    of_texts = {**COMMON, "pooling": "mean", "normalize_embeddings": False}
    given = {"model": {"pooling": "mean", "normalize_embeddings": False}}
    assert settings_of(experiment_of(tiny_model, "encoder", **given)) == {**of_texts, "family": "encoder"}
    assert settings_of(experiment_of(tiny_model, "m3", **given)) == {**of_texts, "family": "m3"}
    decoder = settings_of(experiment_of(tiny_model, "decoder", model={**given["model"], "bidirectional": True}))
    assert decoder == {**of_texts, "family": "decoder", "bidirectional": True}
    assert settings_of(experiment_of(tiny_model, "reranker-encoder")) == {**COMMON, "family": "reranker-encoder"}
    asks = settings_of(experiment_of(tiny_model, "reranker-decoder", reranker={"prompt": "Is it?"}))
    assert asks == {**COMMON, "family": "reranker-decoder", "prompt": "Is it?"}
    assert settings_of(experiment_of(tiny_model, "reranker-decoder"))["prompt"] == PROMPT
    icl = settings_of(experiment_of(tiny_model, "icl", icl={"examples_for_task": [{"query": "q", "response": "r"}]}))
    assert icl["icl"]["examples_for_task"] == [{"query": "q", "response": "r", "instruct": None}]


def test_the_file_comes_back_and_none_is_none(tiny_model: Path, tmp_path: Path) -> None:
    experiment = experiment_of(tiny_model, "encoder", model={"passage_instruction_for_retrieval": "für\n"})
    write_settings(experiment, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert read_settings(str(tmp_path)) == settings_of(experiment)
    assert read_settings(str(tiny_model)) is None
    (tmp_path / "rayembed.json").write_text('{"family": "later"}')
    with pytest.raises(ValueError, match=r"its rayembed\.json says family 'later'; allowed: encoder, m3, .* later ver"):
        read_settings(str(tmp_path))


def test_caches_notice_what_the_file_says(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    found = []
    for passages in (40, 41):
        experiment = experiment_of(tiny_model, "encoder")
        write_settings(experiment, folder)
        told = json.loads((folder / "rayembed.json").read_text())
        (folder / "rayembed.json").write_text(json.dumps({**told, "passage_max_len": passages}))
        found.append(weights_fingerprint(str(folder)))
    assert len({*found, weights_fingerprint(str(tiny_model))}) == 3
    (folder / "rayembed.json").unlink()
    assert weights_fingerprint(str(folder)) == weights_fingerprint(str(tiny_model))
    assert tokenizer_fingerprint(str(folder)) == tokenizer_fingerprint(str(tiny_model))


def test_an_exported_embedder_is_used_as_it_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    experiment = experiment_of(tiny_model, "encoder", model={"pooling": "mean", "normalize_embeddings": False})
    save_embedder(load_embedder(experiment.model), tokenizer_of(experiment.model), experiment, tmp_path / "model")
    found = embedder_config(str(tmp_path / "model"))
    expected = {"family": "encoder", "pooling": "mean", "normalize_embeddings": False, **TOLD}
    assert found == ModelConfig(name_or_path=str(tmp_path / "model"), **expected)  # type: ignore[arg-type]
    assert query_text(found, "x") == query_text(experiment.model, "x") == "find: x ="


def test_what_is_given_goes_before_what_the_file_says(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    write_settings(experiment_of(tiny_model, "m3", model={"passage_instruction_for_retrieval": "p: "}), folder)
    own = embedder_config(str(folder), pooling="mean", query_instruction="q: ", passage_instruction="")
    assert (query_text(own, "x"), own.passage_instruction_for_retrieval) == ("q: x", "")
    assert (own.family, own.pooling) == ("encoder", "mean"), "of BGE-M3, the dense vectors"
    assert embedder_config(str(folder)).passage_instruction_for_retrieval == "p: "


def test_a_reranker_is_no_embedder(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    write_settings(experiment_of(tiny_model, "reranker-encoder"), folder)
    with pytest.raises(ValueError, match=r"is a reranker, by its rayembed\.json; choose an embedder"):
        embedder_config(str(folder))


@pytest.mark.parametrize(
    ("stored", "given", "family"),
    [
        ("lasttoken", None, "decoder"),
        ("mean", None, "encoder"),
        ("mean", "last_token", "decoder"),
        (None, None, "decoder"),
    ],
)
def test_a_causal_model_of_others_is_a_decoder_where_its_last_token_is_the_text(
    tmp_path: Path, stored: str | None, given: str | None, family: str
) -> None:
    folder = save_decoder(tmp_path / "model", qwen_embedding_tokenizer())
    if stored is not None:
        st_files(folder, stored)
    found = embedder_config(str(folder), pooling=given)
    assert found == ModelConfig(name_or_path=str(folder), family=family, pooling=given)  # type: ignore[arg-type]


def test_a_decoder_with_heads_is_one_too(tmp_path: Path) -> None:
    tiny_decoder("Llama", head="ForCausalLM").save_pretrained(tmp_path)
    assert embedder_config(str(tmp_path)).family == "decoder"


@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        *((kind, True) for kind in ("Qwen2", "Qwen3", "Llama", "Mistral", "Gemma", "Gemma2", "GPT2", "Phi", "OPT")),
        *(
            (kind, False)
            for kind in ("Bert", "XLMRoberta", "MPNet", "DistilBert", "ModernBert", "T5", "Bart", "Marian")
        ),
    ],
)
def test_causal_models_are_told_by_the_tables_of_transformers(kind: str, causal: bool) -> None:
    assert is_causal(getattr(transformers, f"{kind}Config")()) == causal


def test_an_unknown_model_is_told_by_the_name_of_its_class() -> None:
    class Own(transformers.PretrainedConfig):
        model_type = "of-its-own"

    assert [is_causal(Own(architectures=[name])) for name in ("OwnForCausalLM", "OwnModel")] == [True, False]
    assert not is_causal(Own())


def test_the_family_changes_a_decoders_vectors(tmp_path: Path) -> None:
    """As an encoder it is read without the token at the end, which is what made retrievers wrong."""
    folder = st_files(save_decoder(tmp_path / "model", qwen_tokenizer()), "lasttoken")
    found = {}
    for config in (embedder_config(str(folder)), ModelConfig(name_or_path=str(folder))):
        tokenizer, model = tokenizer_of(config), load_embedder(config)
        how: dict[str, Any] = {"max_len": 16, "tokens_per_batch": 64, "dtype": torch.float32}
        found[config.family] = encode(model, tokenizer, ["a text", "another, longer one"], **how)
    assert np.abs(found["decoder"] - found["encoder"]).max() > 0.01
