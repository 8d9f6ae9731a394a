"""Adapters that cannot be merged as they are meant are refused, and not merged in part."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from rayembed.config import Experiment
from rayembed.models.adapters import check_folders
from rayembed.models.merging import tokens_of_adapters
from tests.models.tiny_decoders import qwen_tokenizer, save_decoder


def save_random_adapter(backbone: Any, folder: Path, *, seed: int, targets: list[str]) -> Path:  # noqa: ANN401
    """An adapter by peft alone that changes vectors a lot; the backbone has it in it afterwards."""
    model: Any = peft.get_peft_model(backbone, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    base = save_decoder(tmp_path / "base", qwen_tokenizer())
    model = {"name_or_path": str(base), "family": "decoder", "additional_special_tokens": ["<own>", "<b>"]}
    return Experiment(output_dir=str(tmp_path / "run"), model=model)  # type: ignore[arg-type]


def folder_with_tokens(folder: Path, *tokens: str) -> str:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    save_file({"base_model.model.embed_tokens.rows": torch.ones(1)}, folder / "adapter_model.safetensors")
    return str(folder)


def test_new_tokens_without_rows_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    folder = Path(folder_with_tokens(tmp_path / "1", "<a>"))
    save_file({"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has the tokens <a>, which the model has not, and the adapter has no rows"):
        tokens_of_adapters(experiment, [str(folder)])


def test_tokens_come_in_the_order_of_their_numbers_before_the_experiment_s(
    experiment: Experiment, tmp_path: Path
) -> None:
    first, second = (folder_with_tokens(tmp_path / str(n), *["<b>", "<a>", "<c>"][:n]) for n in (2, 3))
    assert tokens_of_adapters(experiment, [first, str(tmp_path), second]) == ["<b>", "<a>", "<c>", "<own>"]
    assert tokens_of_adapters(experiment, [str(tmp_path)]) == ["<own>", "<b>"]


@pytest.mark.parametrize("tokens", [["<c>"], ["<b>", "<a>"], ["<x>", "<a>"]])
def test_two_vocabularies_are_refused(experiment: Experiment, tmp_path: Path, tokens: list[str]) -> None:
    first, second = folder_with_tokens(tmp_path / "1", "<a>", "<b>"), folder_with_tokens(tmp_path / "2", *tokens)
    with pytest.raises(ValueError, match=rf"2 was trained with the tokens {', '.join(tokens)} added, and one before"):
        tokens_of_adapters(experiment, [first, second])


def test_what_cannot_be_merged_is_refused_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(FileNotFoundError, match=r"merge\.adapters: .*prompt holds no weights of an adapter"):
        check_folders([str(tmp_path / "prompt")], setting="merge.adapters")
    (tmp_path / "prompt" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"merge\.adapters: .*prompt is of the kind PROMPT_TUNING; allowed: LORA"):
        check_folders([str(tmp_path / "prompt")], setting="merge.adapters")
    with pytest.raises(FileNotFoundError, match=r"merge\.adapters: nowhere holds no adapter \(no adapter_config\.json"):
        check_folders(["nowhere"], setting="merge.adapters")
