"""An exported folder gives the trained vectors wherever it is loaded, and is there in full or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.data.prompts import passage_text, query_text
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import encode
from rayembed.models.export import prompt_suffix, prompts, save_embedder
from rayembed.models.loading import load_embedder, load_tokenizer, pooling_of
from rayembed.models.pooling import POOLINGS

QUERIES = ["what is it", "x", "how do plants grow in winter? " * 3]
PASSAGES = ["a thing", "so they wait for light " * 10, "", "1 2 3"]
POOLING_NAMES = ["cls", "mean", "last_token"]


def experiment_of(model: Path | str, **settings: Any) -> Experiment:  # noqa: ANN401
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path=str(model), **settings),
        data=DataConfig(query_max_len=24, passage_max_len=40),
    )


def trained(experiment: Experiment) -> Embedder:
    """The experiment's model with other weights than its checkpoint's."""
    model = load_embedder(experiment.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def export(experiment: Experiment, folder: Path) -> Embedder:
    model = trained(experiment)
    save_embedder(model, load_tokenizer(experiment.model.name_or_path, padding_side="right"), experiment, folder)
    return model


def vectors(model: Embedder, experiment: Experiment, texts: list[str]) -> NDArray[np.float32]:
    """As in training, cut to the exported length."""
    tokenizer = load_tokenizer(experiment.model.name_or_path, padding_side="right")
    return encode(model, tokenizer, texts, max_len=40, tokens_per_batch=4096, dtype=torch.float32)


def sentence_transformer(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_sentence_transformers_gives_the_trained_vectors(
    tiny_model: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    experiment = experiment_of(tiny_model, pooling=pooling, normalize_embeddings=normalize)
    expected = vectors(export(experiment, tmp_path / "model"), experiment, PASSAGES)
    loaded = sentence_transformer(tmp_path / "model")
    np.testing.assert_allclose(loaded.encode(PASSAGES), expected, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_document(PASSAGES), expected, atol=1e-5)
    assert loaded.max_seq_length == 40
    assert loaded.get_embedding_dimension() == 64
    assert loaded.similarity_fn_name == ("cosine" if normalize else "dot")
    assert (np.abs(np.linalg.norm(expected, axis=1) - 1) < 1e-5).all() == normalize
    assert np.abs(vectors(load_embedder(experiment.model), experiment, PASSAGES) - expected).max() > 0.01


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_transformers_gives_the_trained_vectors(tiny_model: Path, tmp_path: Path, pooling: str) -> None:
    experiment = experiment_of(tiny_model, pooling=pooling, normalize_embeddings=False)
    expected = vectors(export(experiment, tmp_path / "model"), experiment, PASSAGES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = tokenizer(
        PASSAGES, padding=True, truncation=True, return_tensors="pt"
    )  # the length is the tokenizer's own
    assert inputs["input_ids"].shape[1] == 40
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(tmp_path / "model").eval()(**inputs).last_hidden_state
    pooled = POOLINGS[pooling](hidden, inputs["attention_mask"])
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_an_exported_folder_trains_on_with_its_pooling(tiny_model: Path, tmp_path: Path, pooling: str) -> None:
    experiment = experiment_of(tiny_model, pooling=pooling)
    expected = vectors(export(experiment, tmp_path / "model"), experiment, PASSAGES)
    again = experiment_of(tmp_path / "model")
    assert pooling_of(again.model) == pooling
    np.testing.assert_allclose(vectors(load_embedder(again.model), again, PASSAGES), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "passage_form"),
    [("Instruct: {}\nQuery: {}", "{}{}"), (r"Instruct: {}\nQuery: {}", "{} | {}"), ("{}{}", "{}{}")],
)
def test_prompts_of_queries_and_documents_reach_sentence_transformers(
    tiny_model: Path, tmp_path: Path, form: str, passage_form: str
) -> None:
    experiment = experiment_of(
        tiny_model,
        pooling="mean",
        query_instruction_for_retrieval="find it {now}",
        query_instruction_format=form,
        passage_instruction_for_retrieval="passage: ",
        passage_instruction_format=passage_form,
    )
    model = export(experiment, tmp_path / "model")
    loaded = sentence_transformer(tmp_path / "model")
    asked = vectors(model, experiment, [query_text(experiment.model, text) for text in QUERIES])
    read = vectors(model, experiment, [passage_text(experiment.model, text) for text in PASSAGES])
    np.testing.assert_allclose(loaded.encode_query(QUERIES), asked, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_document(PASSAGES), read, atol=1e-5)
    bare = vectors(model, experiment, QUERIES)
    np.testing.assert_allclose(loaded.encode(QUERIES), bare, atol=1e-5)  # no prompt unless asked for
    assert np.abs(bare - asked).max() > 0.01


def test_without_an_instruction_nothing_is_put_before_a_text() -> None:
    model = ModelConfig(name_or_path="x", query_instruction_format="Instruct: {}\nQuery: {}")
    assert prompts(model) == {"query": "", "document": ""}
    assert not prompt_suffix(model)


def test_text_after_the_query_is_noticed() -> None:
    before = ModelConfig(name_or_path="x", query_instruction_for_retrieval="i", query_instruction_format="{}: {}")
    after = ModelConfig(name_or_path="x", query_instruction_for_retrieval="i", query_instruction_format="{}: {} =")
    passage = ModelConfig(name_or_path="x", passage_instruction_for_retrieval="i", passage_instruction_format="{}{}.")
    assert [prompt_suffix(model) for model in (before, after, passage)] == [False, True, True]
    assert prompts(after)["query"] == "i: "


def test_the_dropout_of_the_experiment_stays_out_of_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    export(experiment_of(tiny_model, dropout=0.0), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (settings["hidden_dropout_prob"], settings["attention_probs_dropout_prob"]) == (0.1, 0.1)


def test_an_older_folder_is_replaced_in_full(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export(experiment_of(tiny_model, normalize_embeddings=True), folder)
    (folder / "left.txt").write_text("of another run")
    experiment = experiment_of(tiny_model, normalize_embeddings=False)
    expected = vectors(export(experiment, folder), experiment, PASSAGES)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "modules.json", "1_Pooling"} <= names
    assert names.isdisjoint({"left.txt", "2_Normalize"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    np.testing.assert_allclose(sentence_transformer(folder).encode(PASSAGES), expected, atol=1e-5)


@pytest.mark.parametrize("older", [False, True])
def test_a_write_that_is_cut_off_leaves_no_half_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    folder, experiment = tmp_path / "model", experiment_of(tiny_model)
    if older:
        export(experiment, folder)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr("rayembed.models.export.sentence_transformers_files", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(experiment, folder)
    assert folder.exists() == older
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    expected = vectors(export(experiment, folder), experiment, PASSAGES)  # what was left is no obstacle
    np.testing.assert_allclose(sentence_transformer(folder).encode(PASSAGES), expected, atol=1e-5)
