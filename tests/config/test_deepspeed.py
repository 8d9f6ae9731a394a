"""DeepSpeed gets what the experiment decides, and a file that says otherwise is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))


def settings(
    deepspeed: str | dict[str, Any] | None,
    *,
    use_gpu: bool = False,
    **train: Any,  # noqa: ANN401 - any setting of the section
) -> dict[str, Any]:
    return deepspeed_settings(
        Experiment(
            output_dir="unused",
            model=ModelConfig(name_or_path="unused"),
            ray=RayConfig(num_workers=2, use_gpu=use_gpu),
            train=TrainConfig(deepspeed=deepspeed, **train),
        )
    )


def test_sizes_and_clipping_come_from_the_experiment() -> None:
    train: dict[str, Any] = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3, "max_grad_norm": 0.0}
    found = settings(None, **train)
    assert found["train_micro_batch_size_per_gpu"] == 6
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_batch_size"] == 6 * 2 * 3
    assert found["gradient_clipping"] == 0.0  # said, or DeepSpeed clips at 1.0
    assert found["zero_optimization"]["stage"] == 0
    assert settings(None, global_batch_size=8)["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_load_and_keep_what_they_say(path: Path) -> None:
    shipped = json.loads(path.read_text())
    found = settings(str(path))
    assert shipped.items() <= found.items()
    assert json.loads(path.read_text()) == shipped


def test_the_users_own_dictionary_is_left_as_it_was() -> None:
    given = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    before = json.dumps(given)
    found = settings(given)
    assert json.dumps(given) == before
    assert "optimizer" not in found


def test_auto_values_are_filled_in() -> None:
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto", "loss_scale_window": 100},
        "bf16": {"enabled": "auto"},
    }
    found = settings(auto, per_device_train_batch_size=4, max_grad_norm=0.5, bf16=True)
    assert "auto" not in json.dumps(found)
    assert (found["train_batch_size"], found["gradient_clipping"]) == (8, 0.5)
    assert found["fp16"] == {"enabled": False, "loss_scale_window": 100}
    assert found["bf16"] == {"enabled": False}  # bfloat16 is autocast over float32 weights here
    assert settings(auto, fp16=True, use_gpu=True)["fp16"]["enabled"] is True


def test_fp16_reaches_deepspeed_without_a_file() -> None:
    assert settings(None, fp16=True, use_gpu=True)["fp16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 7}, r"train_batch_size is 7, but the experiment makes it 64; write auto"),
        ({"gradient_clipping": 0.3}, r"gradient_clipping is 0\.3, but the experiment makes it 1\.0; write auto"),
        ({"optimizer": {"params": {"lr": 1e-4, "eps": "auto"}}}, r"optimizer\.params sets lr; write them under train"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, r"scheduler\.params sets warmup_num_steps"),
        ({"zero_optimization": {"stage": 4}}, r"stage is 4; 0, 1, 2 and 3 are allowed"),
        ("nowhere.json", r"no file 'nowhere\.json'; see configs/deepspeed/"),
    ],
)
def test_contradictions_are_refused(given: str | dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^train\.deepspeed: .*" + message):
        settings(given)


def test_two_kinds_of_bfloat16_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.bf16 .* and DeepSpeed's bf16\.enabled are both on"):
        settings({"bf16": {"enabled": True}}, bf16=True)


@pytest.mark.parametrize(("text", "message"), [('{\n"a": }', r":2: not JSON"), ("[1]", r"holds a list, not an object")])
def test_files_that_are_no_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        settings(str(tmp_path / "ds.json"))
