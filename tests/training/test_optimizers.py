"""AdamW with moments in 8 bits follows that of 32, takes a quarter of its memory, and resumes exactly."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayembed.config.train import TrainConfig
from rayembed.training import optimizers
from rayembed.training.engine import Engine
from rayembed.training.optimizers import adamw, check_optimizer, parameter_groups
from tests.training.processes import in_workers
from tests.training.test_engine import experiment, make_engine

EIGHT = {"optim": "adamw_bnb_8bit"}
WIDTH, STEPS, SAVED_AFTER = 64, 12, 6
Losses = list[float]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))


def engine_of(stage: int, **train: Any) -> Engine:  # noqa: ANN401 - any setting of the section
    settings = {"learning_rate": 1e-3, "adam_epsilon": 1e-8, "lr_scheduler_type": "constant", **train}
    return make_engine(experiment(Path("unused"), torch.distributed.get_world_size(), stage, **settings), network())


def trained(engine: Engine, first: int, last: int) -> Losses:
    losses = []
    for number in range(first, last):
        inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
        loss = (engine(inputs) - inputs.roll(1, 1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def bytes_of_moments(found: Any) -> int:  # noqa: ANN401 - a tensor, or what holds some
    if isinstance(found, dict):
        return sum(map(bytes_of_moments, found.values()))
    large = isinstance(found, Tensor) and found.numel() > 256  # else a table of the 256 values of 8 bits
    return found.numel() * found.element_size() if large else 0


def train_both(stage: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for optim in ("adamw_torch", "adamw_bnb_8bit"):
        engine = engine_of(stage, optim=optim)
        found[optim] = trained(engine, 0, SAVED_AFTER)
        if optim == "adamw_bnb_8bit":
            engine.save(folder, {"step": SAVED_AFTER})
        found[optim] += trained(engine, SAVED_AFTER, STEPS)
        inner: Any = engine._engine.optimizer
        found[optim, "bytes"] = bytes_of_moments(dict(getattr(inner, "optimizer", inner).state))
    resumed = engine_of(stage, **EIGHT)
    assert resumed.load(folder)["step"] == SAVED_AFTER
    found["resumed"] = trained(resumed, SAVED_AFTER, STEPS)
    return found


STAGES = (0, 2, 3)


def train_all(folder: Path) -> list[dict[str, Any]]:
    return [train_both(stage, folder / str(stage)) for stage in STAGES]


def resume_on_others(folder: Path) -> tuple[Losses, list[str]]:
    """Of ZeRO 0, which holds whole moments on each worker, the losses; of the others, why not."""
    engine = engine_of(0, **EIGHT)
    engine.load(folder / "0")
    losses, refused = trained(engine, SAVED_AFTER, STEPS), []
    for stage in STAGES[1:]:
        with pytest.raises(ValueError, match="8 bits") as error:
            engine_of(stage, **EIGHT).load(folder / str(stage))
        refused.append(str(error.value))
    return losses, refused


def test_it_follows_32_bits_in_a_quarter_of_the_memory_and_resumes(tmp_path: Path) -> None:
    (stages,) = in_workers(1, train_all, tmp_path)
    for found in stages:
        exact, rounded = found["adamw_torch"], found["adamw_bnb_8bit"]
        assert rounded == pytest.approx(exact, rel=2e-3)
        assert rounded != exact
        assert exact[0] - exact[-1] > 0.02, "something is learnt"
        assert found["adamw_bnb_8bit", "bytes"] / found["adamw_torch", "bytes"] == pytest.approx(0.25, abs=0.01)
        assert found["resumed"] == rounded[SAVED_AFTER:], "to the last bit"
    for losses, refused in in_workers(2, resume_on_others, tmp_path):
        assert losses == pytest.approx(stages[0]["resumed"], rel=1e-5)
        assert all("set ray.num_workers to 1" in message for message in refused)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_the_optimiser_is_told_all_settings(optim: str) -> None:
    train = TrainConfig(
        optim=optim, learning_rate=0.3, weight_decay=0.2, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=0.7
    )
    weight, bias = adamw(nn.Linear(2, 3), train, fused=False).param_groups
    for group, decay in ((weight, 0.2), (bias, 0.0)):
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (
            0.3,
            (0.5, 0.6),
            0.7,
            decay,
        )


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert [len(group["params"]), group["weight_decay"]] == [3, 0.0]


ZERO_2 = {"stage": 2}


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(TrainConfig(), ZERO_2, use_gpu=True, elastic=True)
    with pytest.raises(ModuleNotFoundError, match=r"train\.optim.* needs .*bitsandbytes; pip .* to adamw_torch"):
        check_optimizer(TrainConfig(**EIGHT), ZERO_2, use_gpu=True, elastic=False)


def test_a_number_of_workers_that_may_change_is_refused_where_blocks_are_cut() -> None:
    train = TrainConfig(**EIGHT)
    check_optimizer(train, {"stage": 0}, use_gpu=True, elastic=True)
    check_optimizer(train, ZERO_2, use_gpu=True, elastic=False)
    with pytest.raises(ValueError, match=r"set ray\.num_workers to one number"):
        check_optimizer(train, ZERO_2, use_gpu=True, elastic=True)


@pytest.mark.parametrize(
    ("use_gpu", "zero", "refused"),
    [
        (True, ZERO_2, False),
        (False, ZERO_2, True),
        (True, {**ZERO_2, "offload_optimizer": {"device": "cpu"}}, True),
        (True, {**ZERO_2, "offload_optimizer": {"device": "none"}}, False),
    ],
)
def test_a_release_that_takes_no_step_on_a_cpu_is_refused_there_alone(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool, zero: dict[str, Any], refused: bool
) -> None:
    train = TrainConfig(**EIGHT)
    check_optimizer(train, copy.deepcopy(zero), use_gpu=use_gpu, elastic=False)  # the one that is installed does

    class Older:
        def AdamW8bit(self, *_: object, **__: object) -> torch.optim.Optimizer:
            raise NotImplementedError("no kernel")

    monkeypatch.setattr(optimizers, "_bitsandbytes", Older)
    if not refused:
        check_optimizer(train, zero, use_gpu=use_gpu, elastic=False)
        return
    with pytest.raises(ValueError, match=r"no step on a CPU .*\(no kernel\); pip install"):
        check_optimizer(train, zero, use_gpu=use_gpu, elastic=False)
