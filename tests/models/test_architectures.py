"""Vectors, dropout, position embeddings and gradients of every architecture that the README lists."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.models.chunks import TokenBatch, pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import encode, tokenize
from rayembed.models.export import save_embedder
from rayembed.models.loading import (
    check_length,
    dropout_keys,
    load_config,
    load_embedder,
    prepare_for_training,
    tokenizer_of,
)
from rayembed.models.trained import build_model
from tests.models.tiny_architectures import ARCHITECTURES, LONGEST, save_tiny
from tests.models.tiny_decoders import tiny_gpt2

TEXTS = ["what is it?", "q", "a vector does not depend on what is in its batch. ", "so it goes. " * 20, "is it so?"]
CASES = [(name, pooling) for name, made in ARCHITECTURES.items() for pooling in made.poolings]
DROPOUT = 0.3
NOT_CHECKPOINTED = {"MPNet"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each architecture, with dropout wherever its configuration knows one."""
    made = {}
    for name in ARCHITECTURES:
        plain = save_tiny(name, tmp_path_factory.mktemp("plain"))
        dropout = {key: DROPOUT for key in load_config(str(plain)).to_dict() if "drop" in key}
        made[name] = save_tiny(name, tmp_path_factory.mktemp(name), **dropout)
    return made


def settings_of(name: str, folders: dict[str, Path], **settings: Any) -> ModelConfig:  # noqa: ANN401
    told: dict[str, Any] = {"name_or_path": str(folders[name]), "family": ARCHITECTURES[name].family}
    return ModelConfig(**told | settings)


def batch_of(config: ModelConfig) -> TokenBatch:
    tokenizer = tokenizer_of(config)
    ids = tokenize(tokenizer, TEXTS, LONGEST)
    return pad_chunks(ids, pad_token=int(tokenizer.pad_token_id), padding_side=tokenizer.padding_side)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "pooling"), CASES)
def test_sentence_transformers_gives_the_trained_vectors(
    folders: dict[str, Path], tmp_path: Path, name: str, pooling: str
) -> None:
    from sentence_transformers import SentenceTransformer

    config = settings_of(name, folders, pooling=pooling)
    experiment = Experiment(
        output_dir="unused", model=config, data=DataConfig(query_max_len=16, passage_max_len=LONGEST)
    )
    model, tokenizer = load_embedder(config), tokenizer_of(config)
    change(model)
    save_embedder(model, tokenizer, experiment, tmp_path / "model")
    how: dict[str, Any] = {"max_len": LONGEST, "dtype": torch.float32}
    found = encode(model, tokenizer, TEXTS, tokens_per_batch=4096, **how)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(theirs.encode(TEXTS), found, atol=1e-5)
    alone = np.concatenate([encode(model, tokenizer, [text], tokens_per_batch=4096, **how) for text in TEXTS])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert (found @ found.T - np.eye(len(TEXTS))).max() < 0.999, "texts look alike: nothing is shown"


def change(model: Embedder) -> None:
    """Other weights than the checkpoint's, as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_dropout_is_left_where_the_experiment_says_zero(folders: dict[str, Path], name: str) -> None:
    config = settings_of(name, folders, pooling="mean")
    batch = batch_of(config)

    def differs(dropout: float | None) -> float:
        model = load_embedder(settings_of(name, folders, pooling="mean", dropout=dropout))
        evaluated = model.embed(batch)
        model.train()
        return max((model.embed(batch) - evaluated).abs().max().item() for _ in range(2))

    assert differs(None) > 0.01
    assert differs(0.0) == 0


def test_every_probability_of_the_configurations_is_known(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        found = load_config(str(folder))
        assert dropout_keys(found) == [key for key, value in found.to_dict().items() if value == DROPOUT], name
    gpt2 = tiny_gpt2().config
    assert dropout_keys(gpt2) == ["resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"]  # type: ignore[arg-type]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_trained_gets_a_gradient_and_positions_are_fixed_on_wish(
    folders: dict[str, Path], name: str, fixed: bool
) -> None:
    made = ARCHITECTURES[name]
    for pooling in made.poolings:
        config = settings_of(name, folders, pooling=pooling)
        model = load_embedder(config)
        prepare_for_training(model, family=made.family, fix_position_embedding=fixed, gradient_checkpointing=False)
        loss(model, batch_of(config)).backward()  # type: ignore[no-untyped-call]
        parameters = dict(model.backbone.named_parameters())
        frozen = {key for key, parameter in parameters.items() if not parameter.requires_grad}
        assert {key for key in frozen if not key.startswith("pooler.")} == (made.positions if fixed else set())
        assert {key for key, parameter in parameters.items() if parameter.grad is None} == frozen, pooling


def loss(model: Embedder, batch: TokenBatch) -> Tensor:
    vectors = model.embed(batch)
    return (vectors @ vectors.T).square().sum()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_a_reranker_all_of_it_is_trained_and_no_dropout_is_left(folders: dict[str, Path], name: str) -> None:
    made = ARCHITECTURES[name]
    config = settings_of(name, folders, family=f"reranker-{made.family}", dropout=0.0)
    model: Any = build_model(Experiment(output_dir="unused", model=config))
    batch = batch_of(config)
    evaluated = model.score(batch)
    prepare_for_training(model, family=config.family, fix_position_embedding=True, gradient_checkpointing=False)
    scores = model.score(batch)
    torch.testing.assert_close(scores, evaluated, atol=0, rtol=0)
    scores.square().sum().backward()
    parameters = dict(model.backbone.named_parameters())
    fixed = {key for key, parameter in parameters.items() if not parameter.requires_grad}
    assert {key.partition(".")[2] for key in fixed} == made.positions
    assert {key for key, parameter in parameters.items() if parameter.grad is None} == fixed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(folders: dict[str, Path], name: str) -> None:
    config = settings_of(name, folders, pooling="mean")
    if name in NOT_CHECKPOINTED:
        with pytest.raises(ValueError, match=r"train\.gradient_checkpointing is true, and MPNetModel cannot"):
            prepare_for_training(
                load_embedder(config), family="encoder", fix_position_embedding=False, gradient_checkpointing=True
            )
        return

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = load_embedder(config)
        prepare_for_training(
            model, family=config.family, fix_position_embedding=False, gradient_checkpointing=checkpointing
        )
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == checkpointing
        torch.manual_seed(5)
        loss(model, batch_of(config)).backward()  # type: ignore[no-untyped-call]
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_longest_text_allowed_is_read(folders: dict[str, Path], name: str) -> None:
    config = settings_of(name, folders, pooling="mean")
    model = load_embedder(config)

    def vectors(length: int) -> Tensor:
        ids = [[5 + i % 20 for i in range(length)], [5, 6]]
        return model.embed(pad_chunks(ids, pad_token=int(tokenizer_of(config).pad_token_id), padding_side="right"))

    check_length(config.name_or_path, LONGEST, "x")
    assert vectors(LONGEST).isfinite().all()
    with pytest.raises(ValueError, match=f"x is {LONGEST + 1}, but .* at most {LONGEST} tokens"):
        check_length(config.name_or_path, LONGEST + 1, "x")
    if ARCHITECTURES[name].positions:  # a vector for each, and none is left
        with pytest.raises((IndexError, RuntimeError)):
            vectors(LONGEST + 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokenizer_is_that_of_the_architecture(folders: dict[str, Path], name: str) -> None:
    """Or the vectors above would be of models that nobody publishes."""
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    assert tokenizer.pad_token_id == load_config(str(folders[name])).pad_token_id or name in {"Llama", "Mistral"}
    assert len({len(tokenizer(text)["input_ids"]) for text in TEXTS}) > 3
