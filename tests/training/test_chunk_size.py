"""The probe of chunks: which size it takes, on which texts, and that a run keeps it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayembed.config.train import TrainConfig
from rayembed.training import chunk_size
from rayembed.training.chunk_size import FILE, Trial, choose, probed_tokens
from rayembed.training.memory import container_bytes, optimizer_bytes
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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_where_a_gpu_has_no_room_the_size_before_is_taken(error: Exception) -> None:
    def measured(tokens: int) -> tuple[float, int]:
        if tokens > 3000:
            raise error
        return 1.0, 1

    tokens, trials = choose(measured, first=1024, budget=ROOM)
    assert tokens == 2048
    assert [one.tokens for one in trials] == [1024, 2048, 4096]

    def broken(_tokens: int) -> tuple[float, int]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        choose(broken, first=1024, budget=ROOM)


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
    assert [one["tokens"] for one in found["tried"]] == [144 * 2**i for i in range(len(found["tried"]))]  # 6 texts
    fixed = experiment(
        model, workers=dist.get_world_size(), stage=3, tokens_per_chunk=found["tokens_per_chunk"], **told
    )
    train_one(fixed, runs[1])
    return [run.losses() for run in runs]


def test_training_is_that_of_the_number_in_the_settings(tiny_model: Path, written: Path) -> None:
    for probed, fixed in in_workers(2, probe_and_train, tiny_model, written):
        assert probed == fixed
        assert len(probed) == 3


def test_a_run_that_goes_on_as_before_keeps_its_number(tmp_path: Path) -> None:
    told: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "folder": tmp_path}
    nothing: Any = None
    found = {"tokens_per_chunk": 777, "workers": 1, "device": "cpu"}
    (tmp_path / FILE).write_text(json.dumps(found))
    assert probed_tokens(nothing, nothing, **told, coming_bytes=0) == 777
    for other in ({"workers": 2}, {"device": "NVIDIA H100"}):
        (tmp_path / FILE).write_text(json.dumps(found | other))
        with pytest.raises(AttributeError):  # it tries again, and there is no model
            probed_tokens(nothing, nothing, **told, coming_bytes=0)


MEMORY = """
import sys, torch
from rayembed.training.allocation import keep_freed_memory
from rayembed.training.chunk_size import _held_bytes, _peak_bytes
keep_freed_memory()
cpu = torch.device("cpu")
for mib in (300, 50, 100, 200):  # the first is what the loading of a model left
    held = _held_bytes(cpu)
    torch.ones(mib * 2**18)
    print(round((_peak_bytes(cpu) - held) / 2**20))
"""


def test_memory_is_what_a_trial_took_though_it_is_kept() -> None:
    told = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    assert [*map(int, told.split())] == pytest.approx([300, 50, 100, 200], abs=15)


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("30\n")
    assert container_bytes(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("100\n")
    assert container_bytes(tmp_path) == 70


def test_what_the_optimiser_will_hold() -> None:
    plain, eight = TrainConfig(), TrainConfig(optim="adamw_bnb_8bit")
    assert optimizer_bytes(10, plain, {"stage": 0}, 4) == 80
    assert optimizer_bytes(10, plain, {"stage": 2}, 4) == 30
    assert optimizer_bytes(10, eight, {"stage": 1}, 2) == 30
    assert optimizer_bytes(10, plain, {"stage": 3, "offload_optimizer": {"device": "cpu"}}, 4) == 0


def test_it_is_of_grad_cache_alone() -> None:
    with pytest.raises(ValueError, match=r"set train\.grad_cache: true"):
        TrainConfig(tokens_per_chunk="probe")
