"""The probe of chunks: which size it takes, on which texts, and that a run keeps it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayembed.config.train import TrainConfig
from rayembed.training import chunk_size
from rayembed.training.chunk_size import FILE, Trial, choose, probed_tokens
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens

ROOM = 10.0**9


def machine(fixed: float, per_token: float, bytes_a_token: int) -> Callable[[int], tuple[float, int]]:
    """Seconds as a start and so much a token; memory by the token."""
    return lambda tokens: (fixed + per_token * tokens, bytes_a_token * tokens)


@pytest.mark.parametrize(
    ("fixed", "room", "expected"),
    [
        (0.0, ROOM, 1024),  # nothing is gained by larger ones
        (1.0, ROOM, 16384),  # twice as many would save 1/32768 s of 1/16384 + 1/1000 s a token, which is under 3 %
        (1.0, 10 * 5000.0, 4096),  # 8192 would not fit
        (1.0, 1.0, 1024),  # nothing fits: nothing smaller would help
    ],
)
def test_the_smallest_size_that_is_as_fast_as_any(fixed: float, room: float, expected: int) -> None:
    tokens, trials = choose(machine(fixed, 1e-3, 10), first=1024, budget=room)
    assert tokens == expected
    assert [one.tokens for one in trials] == [1024 * 2**i for i in range(len(trials))]
    assert trials[0] == Trial(1024, fixed + 1.024, 10240)
    assert max(one.tokens for one in trials) <= max(2 * expected, 1024)
    if room > 10240:
        assert all(one.bytes <= room for one in trials), "tried what could not fit"


def test_where_a_gpu_has_no_room_the_size_before_is_taken() -> None:
    def measured(tokens: int) -> tuple[float, int]:
        if tokens > 3000:
            raise torch.OutOfMemoryError
        return 1.0, 1

    tokens, trials = choose(measured, first=1024, budget=ROOM)
    assert tokens == 2048
    assert [one.tokens for one in trials] == [1024, 2048, 4096]


def chosen_by_each() -> int:
    """Worker 1 is slower, and has less memory."""
    second = dist.get_rank() == 1
    return choose(machine(3.0 if second else 0.0, 1e-3, 10), first=1024, budget=10 * 20000.0 if second else ROOM)[0]


def test_workers_agree() -> None:
    assert in_workers(2, chosen_by_each) == [16384, 16384]


@pytest.fixture
def written(tiny_model: Path, tmp_path: Path) -> Path:
    write_row_tokens(random_rows(18), tiny_model, tmp_path / "tokens")
    return tmp_path


def probe_and_train(model: Path, folder: Path) -> list[list[float]]:
    """With a probe, again, and with the number that it found written in the settings."""
    told: dict[str, Any] = {"global_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "grad_cache": True}
    probing = experiment(model, workers=dist.get_world_size(), stage=3, tokens_per_chunk="probe", **told)
    chunk_size.SMALLEST = 128
    runs = [Run(folder / name, folder / "tokens") for name in ("probed", "fixed")]
    train_one(probing, runs[0])
    found = json.loads((runs[0].folder / "train" / FILE).read_text())
    assert found["tokens_of_longest_text"] == 24
    assert [one["tokens"] for one in found["tried"]] == [128 * 2**i for i in range(len(found["tried"]))]
    fixed = experiment(
        model, workers=dist.get_world_size(), stage=3, tokens_per_chunk=found["tokens_per_chunk"], **told
    )
    train_one(fixed, runs[1])
    return [run.losses() for run in runs]


def test_training_is_that_of_the_number_in_the_settings(tiny_model: Path, written: Path) -> None:
    for probed, fixed in in_workers(2, probe_and_train, tiny_model, written):
        assert probed == fixed
        assert len(probed) == 3


def test_a_run_that_goes_on_keeps_its_number(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text(json.dumps({"tokens_per_chunk": 777}))
    source: Any = None
    model: Any = None
    assert probed_tokens(source, model, dtype=torch.float32, device=torch.device("cpu"), folder=tmp_path) == 777


def test_it_is_of_grad_cache_alone() -> None:
    with pytest.raises(ValueError, match=r"set train\.grad_cache: true"):
        TrainConfig(tokens_per_chunk="probe")
