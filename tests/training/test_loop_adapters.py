"""The end of a training with an adapter: what is written, and from which base, also where it was in 4 bits."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rayembed.config.families import LoraConfig
from rayembed.models.adapters import TARGETS
from rayembed.models.probe import read_probe
from rayembed.training import loop
from tests.models.tiny_decoders import qwen_tokenizer, save_decoder
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 64}


def trained(folder: Path, lora: LoraConfig, stage: int) -> list[str]:
    """Trains with an adapter; what was logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rayembed").addHandler(handler)
    logging.getLogger("rayembed").setLevel(logging.INFO)
    settings = {"global_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "gradient_checkpointing": True}
    setup = experiment(folder / "base", workers=1, stage=stage, pooling="last_token", **settings)  # type: ignore[arg-type]
    setup = replace(setup, model=replace(setup.model, family="decoder"), lora=lora)
    train_one(setup, Run(folder / "run", folder / "tokens"))
    return lines


@pytest.mark.parametrize(("in_4bit", "stage"), [(False, 3), (True, 1)])
def test_the_model_is_the_base_in_full_with_the_adapter_in_it(tmp_path: Path, in_4bit: bool, stage: int) -> None:
    save_decoder(tmp_path / "base", qwen_tokenizer(), **SIZES)
    write_row_tokens(random_rows(12), tmp_path / "base", tmp_path / "tokens")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "of_an_earlier_training").touch()
    lora = LoraConfig(lora_rank=2, lora_alpha=16, lora_dropout=0.0, load_in_4bit=in_4bit)
    lines = in_workers(1, trained, tmp_path, lora, stage)[0]
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"adapter", "model", "train"}
    assert not (run / "adapter" / "of_an_earlier_training").exists()
    base, adapter, model = (
        load_file(run.parent / file)
        for file in ("base/model.safetensors", "run/adapter/adapter_model.safetensors", "run/model/model.safetensors")
    )
    assert base.keys() == model.keys()
    largest = 0.0
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in TARGETS and name.endswith(".weight"):
            down, up = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            change = up @ down * 16 / 2  # the definition: alpha / rank
            value, largest = value + change, max(largest, float(change.abs().max()))
        torch.testing.assert_close(model[name], value, atol=1e-5, rtol=0)
    assert largest > 1e-2, "nothing was trained"
    pairs, vectors = read_probe(run / "train")
    from sentence_transformers import SentenceTransformer

    texts = [text for pair in pairs for text in pair]
    found = SentenceTransformer(str(run / "model"), device="cpu").encode(texts)
    np.testing.assert_allclose(vectors, found, atol=1e-5)
    said = [line for line in lines if "before its 4 bits" in line]
    assert len(said) == in_4bit
    if in_4bit:
        assert 0.5 < float(said[0].rpartition(" ")[2]) < 0.99999


def test_the_adapter_of_an_earlier_training_goes_with_its_model(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(8), tiny_model, tmp_path / "tokens")
    run = Run(tmp_path / "run", tmp_path / "tokens")
    (run.folder / "adapter").mkdir(parents=True)
    in_workers(1, train_one, experiment(tiny_model, workers=1, stage=0, global_batch_size=4, max_steps=1), run)
    assert {path.name for path in run.folder.iterdir()} == {"model", "train"}


def test_without_room_on_the_gpu_the_probe_is_taken_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []

    def crowded(*inputs: Any) -> list[int]:  # noqa: ANN401
        tries.append(inputs)
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return [1]

    monkeypatch.setattr(loop, "probe", crowded)
    worker: Any = loop.Worker.__new__(loop.Worker)
    for name, value in {"device": torch.device("meta"), "probe_texts": (("a", "b"),)}.items():
        object.__setattr__(worker, name, value)
    model = nn.Linear(2, 2)
    monkeypatch.setattr(model, "cpu", lambda: "on the CPU")
    setup = experiment(Path("unused"), workers=1, stage=0)
    assert list(loop._probed(model, qwen_tokenizer(), setup, worker)) == [1]
    assert tries[0][0].weight.device.type == "meta"
    assert tries[1][0] == "on the CPU"
