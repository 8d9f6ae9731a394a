"""What an architecture cannot do is refused before a worker starts, and without its weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from rayembed.jobs.train import check_model
from tests.jobs.conftest import MakeExperiment
from tests.small_models import decoder_folder

ZERO_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Architectures, their weights removed."""
    llama = decoder_folder(tmp_path_factory.mktemp("llama") / "model", "llama", "[CLS]")
    mpnet = shutil.copytree(tiny_model, tmp_path_factory.mktemp("mpnet") / "model")
    transformers.MPNetConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(mpnet)
    for folder in (llama, mpnet):
        (folder / "model.safetensors").unlink()
    return {"llama": str(llama), "mpnet": str(mpnet), "bert": str(tiny_model)}


Sections = dict[str, dict[str, Any]]
Check = Callable[[str, str, Sections], None]
REFUSED: list[tuple[str, str, Sections, str]] = [
    ("mpnet", "encoder", {"train": {"gradient_checkpointing": True}}, "checkpointing is true, and MPNetModel cannot"),
    ("llama", "decoder", {"lora": {"target_modules": ["query"]}}, "lora.target_modules: LlamaModel has no .* query; "),
    ("llama", "reranker-decoder", {"lora": {"modules_to_save": ["score"]}}, "lora.modules_to_save: LlamaForCausalLM"),
    ("llama", "decoder", {"lora": {"load_in_4bit": True}, "train": {"deepspeed": ZERO_3}}, "ZeRO stage 0, 1 or 2"),
]
TAKEN: list[tuple[str, str, Sections]] = [
    ("bert", "encoder", {"train": {"gradient_checkpointing": True}}),
    ("llama", "decoder", {"lora": {"load_in_4bit": True}, "train": {"gradient_checkpointing": True}}),
    (
        "llama",
        "reranker-decoder",
        {"lora": {"modules_to_save": ["lm_head"]}, "train": {"deepspeed": ZERO_3}, "reranker": {"prompt": "?"}},
    ),
]


@pytest.fixture
def check(make_experiment: MakeExperiment, models: dict[str, str], tmp_path: Path) -> Check:
    def made_and_checked(model: str, family: str, sections: Sections) -> None:
        named = {"name_or_path": models[model], "family": family, "pooling": None}
        train = {"temperature": None, **sections.get("train", {})}
        check_model(make_experiment(tmp_path, **{**sections, "model": named, "train": train}))

    return made_and_checked


@pytest.mark.parametrize(("model", "family", "sections", "message"), REFUSED)
def test_refused(check: Check, model: str, family: str, sections: Sections, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(model, family, sections)


@pytest.mark.parametrize(("model", "family", "sections"), TAKEN)
def test_taken(check: Check, model: str, family: str, sections: Sections) -> None:
    check(model, family, sections)
