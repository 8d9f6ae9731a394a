"""Learning rates are those of transformers at every step, and its import is spared."""

import json
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rayembed.config.train import TrainConfig
from rayembed.training.schedule import AFTER_WARMUP, factor, schedule

KINDS = get_args(TrainConfig.__annotations__["lr_scheduler_type"])
PEAK = 3e-4


def optimizer(peak: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))]}], peak)


def rates(made: LambdaLR, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append(made.get_last_lr())
        made.optimizer.step()
        made.step()
    return found


def test_every_kind_of_the_setting_has_a_row() -> None:
    assert set(AFTER_WARMUP) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(17, 0), (17, 1), (17, 5), (17, 16), (1, 0), (6, 9)])
def test_rates_are_those_of_transformers_to_the_last_bit(kind: str, total: int, warmup: int) -> None:
    from transformers import get_scheduler

    theirs = get_scheduler(kind, optimizer(), num_warmup_steps=warmup, num_training_steps=total)
    train = TrainConfig(lr_scheduler_type=kind, learning_rate=PEAK, warmup_steps=warmup)
    steps = max(total, warmup) + 2
    expected = rates(theirs, steps)
    found = rates(schedule(optimizer(), train, total_steps=total), steps)
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({"warmup_ratio": 0.3}, 3),  # of 10, rounded up
        ({"warmup_ratio": 0.21}, 3),
        ({"warmup_ratio": 0.3, "warmup_steps": 0}, 0),
        ({"warmup_ratio": 0.3, "warmup_steps": 4}, 4),
    ],
)
def test_steps_of_warm_up_are_a_share_of_all_or_as_told(settings: dict[str, Any], warmup: int) -> None:
    found = rates(schedule(optimizer(), TrainConfig(learning_rate=PEAK, **settings), total_steps=10), 10)
    assert [rate for rate, _ in found].index(PEAK) == warmup


def test_where_polynomial_has_no_step_after_warm_up_it_is_at_its_end() -> None:
    train = TrainConfig(lr_scheduler_type="polynomial", learning_rate=PEAK)
    assert factor(train, 4, warmup=4, total_steps=4) == 1e-7 / PEAK  # transformers divides by 0
    train = TrainConfig(lr_scheduler_type="polynomial", learning_rate=1e-9)
    assert factor(train, 2, warmup=0, total_steps=4) == 1  # below its end from the beginning


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_goes_on_from_its_state(kind: str) -> None:
    train = TrainConfig(lr_scheduler_type=kind, learning_rate=PEAK, warmup_steps=3)
    whole = rates(schedule(optimizer(), train, total_steps=12), 12)
    first = schedule(optimizer(), train, total_steps=12)
    rates(first, 5)
    state = json.loads(json.dumps(first.state_dict()))
    second = schedule(optimizer(), train, total_steps=12)
    second.load_state_dict(state)
    assert rates(second, 7) == whole[5:]


def test_a_training_worker_starts_without_packages_that_only_adapters_need() -> None:
    code = (
        "import sys, rayembed.training.loop; "
        "print(sorted({'peft', 'bitsandbytes', 'accelerate', 'transformers.trainer_utils'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", "seconds at the start of each worker"
