"""When a checkpoint is due: by steps, by minutes, by a notice; and SIGTERM to one of two workers, which both leave."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayembed.config import Experiment
from rayembed.config.train import TrainConfig
from rayembed.training.batches import Batch
from rayembed.training.leaving import LeftError, asked_to_leave, watch_sigterm
from rayembed.training.meter import Meter
from rayembed.training.saves import Saves
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def saved_at(saves: list[Saves], clock: Clock, steps: int, seconds: float) -> list[int]:
    """At which steps workers save that tell each other what they know; all the same."""
    found = []
    for step in range(1, steps + 1):
        clock.now += seconds
        said = [one.flags() for one in saves]
        together = [any(flag) for flag in zip(*said, strict=True)]
        due = [one.due(step, together) for one in saves]
        assert len(set(due)) == 1, "workers agree"
        if due[0]:
            found.append(step)
    return found


def two(clock: Clock, **settings: Any) -> list[Saves]:  # noqa: ANN401 - of section train
    """Two workers; the clock of the second one is far ahead."""
    config = TrainConfig(**settings)
    return [Saves(config, rank=rank, clock=clock if rank == 0 else lambda: 1e6 + 3 * clock.now) for rank in range(2)]


def test_the_loss_of_a_checkpoint_is_the_mean_since_the_one_before() -> None:
    saves, found = Saves(TrainConfig(save_steps=2), rank=0), []
    for step, loss in enumerate([4.0, 2.0, 1.0, 0.5], start=1):
        saves.add(loss)
        if saves.due(step, saves.flags()):
            found.append(saves.mean_loss())
    assert found == [3.0, 0.75]


def test_steps_alone_count_where_minutes_are_not_set() -> None:
    clock = Clock()
    assert saved_at(two(clock, save_steps=4), clock, 10, 1e4) == [4, 8]


def test_minutes_count_from_the_last_checkpoint_by_the_clock_of_the_first_worker() -> None:
    clock = Clock()
    assert saved_at(two(clock, save_steps=500, save_minutes=1.0), clock, 10, 20) == [3, 6, 9]
    clock = Clock()
    assert saved_at(two(clock, save_steps=5, save_minutes=1.0), clock, 12, 20) == [3, 5, 8, 10]


def test_a_notice_is_asked_for_every_ten_seconds_and_saves_once() -> None:
    clock, asked = Clock(), []

    def notice() -> bool:
        asked.append(clock.now)
        return clock.now > 30

    saves = [Saves(TrainConfig(save_steps=500), rank=0, notice=notice, clock=clock)]
    assert saved_at(saves, clock, 30, 4) == [10]
    assert asked == [4, 16, 28, 40]


def test_the_first_sigterm_asks_and_the_second_does_what_it_did() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        watch_sigterm()
        assert not asked_to_leave()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked_to_leave()
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        watch_sigterm()
        assert not asked_to_leave()
    finally:
        signal.signal(signal.SIGTERM, before)


def left_and_gone_on(setup: Experiment, unbroken: Run, left: Run, batch: int) -> tuple[str, bool, list[int]]:
    """An unbroken run; one of which worker 1 gets SIGTERM in a batch; and where that one saves when it goes on."""
    watch_sigterm()
    train_one(setup, unbroken)
    seen = []

    def seen_by(meter: Meter, loss: torch.Tensor, own: Batch) -> None:
        seen.append(loss)
        if dist.get_rank() == 1 and len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        add(meter, loss, own)

    add, Meter.add = Meter.add, seen_by  # type: ignore[method-assign]
    with pytest.raises(LeftError) as error:
        train_one(setup, left)
    asked = asked_to_leave()
    watch_sigterm()
    return str(error.value), asked, train_one(setup, left, None, 2)


def test_a_sigterm_to_one_worker_saves_and_ends_all_and_the_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(12), tiny_model, tmp_path / "tokens")
    settings = {"global_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    setup = experiment(tiny_model, workers=2, stage=1, **settings)
    unbroken, left = (Run(tmp_path / name, tmp_path / "tokens") for name in ("unbroken", "left"))
    found = in_workers(2, left_and_gone_on, setup, unbroken, left, 3)  # the first of the two batches of step 2
    message = "a worker got SIGTERM and left; the checkpoint of step 2 was saved before"
    assert found == [(message, False, []), (message, True, [])]
    assert [line["step"] for line in left.metrics()] == [1, 2, 3, 4]
    expected, ended = unbroken.weights(), left.weights()
    assert [name for name, value in expected.items() if not torch.equal(value, ended[name])] == []
