"""Estimates are right in what is counted, and in the right order of magnitude in what is measured."""

from pathlib import Path

import pytest
import torch

from rayembed.config.model import ModelConfig
from rayembed.models.cost import operations_per_second, shape_of, training_cost
from rayembed.models.loading import load_embedder


@pytest.fixture
def model(tiny_model: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(tiny_model))


def cost(model: ModelConfig, **changes: object) -> tuple[float, float]:
    settings = {
        "tokens": 1e9,
        "tokens_a_worker_batch": 100.0,
        "bf16": False,
        "checkpointing": False,
        "zero_stage": 0,
        "num_workers": 2,
        "use_gpu": False,
    }
    found = training_cost(model, **{**settings, **changes})  # type: ignore[arg-type]
    return found.seconds, found.bytes_a_worker


def test_parameters_are_counted_as_the_loaded_model_has_them(model: ModelConfig) -> None:
    backbone = load_embedder(model).backbone
    shape = shape_of(model)
    assert shape.parameters == sum(parameter.numel() for parameter in backbone.parameters())
    tables = sum(module.weight.numel() for module in backbone.modules() if isinstance(module, torch.nn.Embedding))
    assert shape.multiplied == shape.parameters - tables
    assert shape.layers == 2


def test_time_grows_with_tokens_and_memory_does_not(model: ModelConfig) -> None:
    (short, little), (long, same) = cost(model), cost(model, tokens=1e11)
    assert long > 10 * short  # a hundred times by count; the measured rate is noisy
    assert same == little


def test_zero_stages_spread_what_they_spread(model: ModelConfig) -> None:
    parameters = shape_of(model).parameters
    memory = [cost(model, zero_stage=stage)[1] for stage in range(4)]
    assert [memory[0] - value for value in memory] == [0, 4 * parameters, 6 * parameters, 8 * parameters]


def test_the_rate_is_that_of_a_processor() -> None:
    assert 1e8 < operations_per_second(torch.float32, torch.device("cpu")) < 1e14
