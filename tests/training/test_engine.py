"""Weights, gradient norms and learning rates of the engine are those of a plain torch loop, at every ZeRO stage."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.models.chunks import TokenBatch, pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.loading import load_embedder, prepare_for_training
from rayembed.training.engine import Engine
from rayembed.training.objective import Objective
from tests.training.made_batches import different_keys, one_dataset, worker_batch
from tests.training.processes import in_workers

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
CPU = torch.device("cpu")
QUERIES, GROUP, STEPS = 4, 2, 3
STAGES = [0, 1, 2, 3]
Weights = dict[str, Tensor]

CASES: dict[str, dict[str, Any]] = {
    "clipped, accumulated, decayed": {
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
    },
    "not clipped": {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
}


@dataclass(frozen=True)
class Trained:
    """What there is to compare after training."""

    weights: Weights
    grad_norms: list[float]
    learning_rates: list[float]


def experiment(
    model: Path,
    workers: int,
    stage: int,
    dropout: float = 0.0,
    **train: Any,  # noqa: ANN401 - any setting of the section
) -> Experiment:
    settings = {
        "global_batch_size": QUERIES,
        "temperature": 0.05,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # so large that gradients of nothing but rounding do not move a weight
        "deepspeed": str(CONFIGS / f"zero{stage}.json"),
    }
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path=str(model), dropout=dropout, pooling="mean"),
        data=DataConfig(train_group_size=GROUP),
        ray=RayConfig(num_workers=workers),
        train=TrainConfig(**{**settings, **train}),
    )


def trainable(model: Path, dropout: float = 0.0) -> Embedder:
    embedder = load_embedder(ModelConfig(name_or_path=str(model), dropout=dropout, pooling="mean"))
    prepare_for_training(embedder, family="encoder", fix_position_embedding=False, gradient_checkpointing=False)
    return embedder


def batch(number: int, rank: int = 0, world_size: int = 1) -> tuple[TokenBatch, TokenBatch]:
    """This worker's queries and passages of a global batch, of different lengths."""
    draw = torch.Generator().manual_seed(number)

    def texts(count: int) -> list[list[int]]:
        lengths = torch.randint(2, 9, (count,), generator=draw).tolist()
        every = [torch.randint(5, 60, (length,), generator=draw).tolist() for length in lengths]
        share = count // world_size
        return every[rank * share : (rank + 1) * share]

    queries, passages = (pad_chunks(texts(n), pad_token=0, padding_side="right") for n in (QUERIES, QUERIES * GROUP))
    return queries, passages


def make_engine(setup: Experiment, model: nn.Module, total_steps: int = STEPS) -> Engine:
    assert setup.train is not None
    settings = deepspeed_settings(setup)
    if settings["zero_optimization"]["stage"] == 3:  # else weights this small are kept whole on each worker
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return Engine(model, setup.train, settings, total_steps=total_steps, device=CPU)


def run(engine: Engine, setup: Experiment, first: int, last: int) -> tuple[list[float], list[float]]:
    """Batches `first` to `last` - 1; gradient norm and learning rate of each update."""
    assert setup.train is not None
    norms, rates, objective = [], [], Objective(setup)
    for number in range(first, last):
        torch.manual_seed(100 * number + dist.get_rank())
        place = dist.get_rank(), dist.get_world_size()
        vectors = engine(batch(number, *place))
        engine.backward(
            objective(vectors, worker_batch(different_keys(QUERIES, GROUP), None, one_dataset(setup), *place))
        )
        rate = engine.learning_rate
        if engine.step():
            norms.append(engine.grad_norm)
            rates.append(rate)
    return norms, rates


def weights(engine: Engine) -> Weights:
    """Of what is trained."""
    return {name: value.clone() for name, value in engine.trained()}


def train_all_cases(folder: Path, stage: int) -> dict[str, Trained]:
    found = {}
    for name, settings in CASES.items():
        setup = experiment(folder, dist.get_world_size(), stage, **settings)
        engine = make_engine(setup, trainable(folder))
        norms, rates = run(engine, setup, 0, STEPS * settings.get("gradient_accumulation_steps", 1))
        found[name] = Trained(weights(engine), norms, rates)
    return found


def plain(folder: Path, settings: dict[str, Any]) -> Trained:
    """The same training by torch alone, in one process, on whole batches."""
    model, norms = trainable(folder), []
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in named if not n.endswith(spared)], "weight_decay": settings.get("weight_decay", 0.0)},
        {"params": [p for n, p in named if n.endswith(spared)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    rates = [0.0, 1e-2, 0.5e-2] if "warmup_steps" in settings else [1e-2] * STEPS
    accumulation = settings.get("gradient_accumulation_steps", 1)
    for step, rate in enumerate(rates):
        for micro in range(accumulation):
            queries, passages = model(batch(step * accumulation + micro))
            loss = F.cross_entropy(queries @ passages.T / 0.05, torch.arange(QUERIES) * GROUP)
            (loss / accumulation).backward()
        largest = settings["max_grad_norm"] or math.inf
        norms.append(nn.utils.clip_grad_norm_([p for _, p in named], largest).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return Trained({name: value.detach() for name, value in named}, norms, rates)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, Trained]:
    before = trainable(tiny_model).state_dict()
    found = {name: plain(tiny_model, settings) for name, settings in CASES.items()}
    for trained in found.values():
        assert max((value - before[name]).abs().max() for name, value in trained.weights.items()) > 5e-3
        assert max(trained.grad_norms) > 1.5, "DeepSpeed's own limit of 1.0 must matter"
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_equals_a_plain_loop(
    tiny_model: Path, expected: dict[str, Trained], world_size: int, stage: int
) -> None:
    for worker in in_workers(world_size, train_all_cases, tiny_model, stage):
        for name, found in worker.items():
            assert found.learning_rates == pytest.approx(expected[name].learning_rates, abs=1e-9), name
            assert found.grad_norms == pytest.approx(expected[name].grad_norms, rel=1e-4), name
            assert found.weights.keys() == expected[name].weights.keys()
            for key, value in expected[name].weights.items():
                torch.testing.assert_close(found.weights[key], value, atol=1e-5, rtol=0)


def save_and_continue(folder: Path, stage: int, checkpoint: Path) -> tuple[Weights, Weights, dict[str, int]]:
    """Weights of an unbroken run with dropout, and of one that went on from its checkpoint."""
    setup = experiment(folder, dist.get_world_size(), stage, dropout=0.2, lr_scheduler_type="cosine")
    unbroken = make_engine(setup, trainable(folder, 0.2), total_steps=6)
    run(unbroken, setup, 0, 3)
    unbroken.save(checkpoint, {"step": 3})
    run(unbroken, setup, 3, 5)
    other = trainable(folder, 0.2)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)  # nothing of what is loaded may come from here
    resumed = make_engine(setup, other, total_steps=6)
    state = resumed.load(checkpoint)
    run(resumed, setup, 3, 5)
    return weights(unbroken), weights(resumed), state


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_resumed_run_ends_bit_for_bit_with_the_same_weights(
    tiny_model: Path, tmp_path: Path, world_size: int, stage: int
) -> None:
    for unbroken, resumed, state in in_workers(world_size, save_and_continue, tiny_model, stage, tmp_path):
        assert state["step"] == 3
        assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []


def load_from(folder: Path) -> str:
    setup = experiment(folder, 1, 0)
    with pytest.raises(FileNotFoundError) as error:
        make_engine(setup, nn.Linear(2, 2)).load(folder / "nothing")
    return str(error.value)


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    assert "holds no DeepSpeed checkpoint" in in_workers(1, load_from, tmp_path)[0]


def bfloat16_step(folder: Path) -> tuple[Tensor, Tensor, Tensor, set[torch.dtype]]:
    """Vectors by the engine, by torch's own autocast and in float32, and the weights' types after a step."""
    setup = experiment(folder, 1, 2, bf16=True)
    own = trainable(folder)
    exact = own(batch(0))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = own(batch(0))[0]
    engine = make_engine(setup, trainable(folder))
    with torch.autocast("cpu", enabled=False):  # what DeepSpeed does around the model on a GPU
        found = engine(batch(0))[0]
    run(engine, setup, 0, 1)
    return found.detach(), rounded.detach(), exact.detach(), {value.dtype for value in weights(engine).values()}


def test_bf16_multiplies_in_bfloat16_and_keeps_weights_in_float32(tiny_model: Path) -> None:
    found, rounded, exact, dtypes = in_workers(1, bfloat16_step, tiny_model)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded, atol=1e-6, rtol=0)
    assert (found - exact).abs().max() > 1e-4
    assert dtypes - {torch.int64} == {torch.float32}


def learning_rates(schedules: list[dict[str, Any]], steps: int) -> list[list[float]]:
    found = []
    for settings in schedules:
        setup = experiment(Path("unused"), 1, 0, **settings)
        engine = make_engine(setup, nn.Linear(2, 2), total_steps=steps)
        rates = []
        for _ in range(steps):
            rates.append(engine.learning_rate)
            engine.backward(engine(torch.ones(1, 2)).sum())
            engine.step()
        found.append(rates)
    return found


def test_learning_rates_follow_the_schedule() -> None:
    rising = [0.0, 0.5e-2]
    schedules: list[tuple[dict[str, Any], list[float]]] = [
        ({"lr_scheduler_type": "linear"}, [1e-2 * (6 - step) / 6 for step in range(6)]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [*rising, *(1e-2 * (6 - n) / 4 for n in range(2, 6))]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 1 / 3}, [*rising, *[1e-2] * 4]),
        (
            {"lr_scheduler_type": "cosine", "warmup_ratio": 0.9, "warmup_steps": 2},
            [*rising, *(0.5e-2 * (1 + math.cos(math.pi * n / 4)) for n in range(4))],
        ),
        ({"lr_scheduler_type": "constant"}, [1e-2] * 6),
    ]
    for found, (settings, expected) in zip(
        in_workers(1, learning_rates, [settings for settings, _ in schedules], 6)[0], schedules, strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-9), settings


def stages_by_file() -> dict[str, tuple[int, float]]:
    """ZeRO stage and gradient clipping as DeepSpeed itself reads each shipped file."""
    import deepspeed

    found = {}
    for path in CONFIGS.glob("*.json"):
        setup = experiment(Path("unused"), 1, 0, deepspeed=str(path), max_grad_norm=0.0)
        settings = deepspeed.DeepSpeedConfig(deepspeed_settings(setup))
        found[path.stem] = (int(settings.zero_config.stage), float(settings.gradient_clipping))
    return found


def test_deepspeed_reads_every_shipped_file() -> None:
    found = in_workers(1, stages_by_file)[0]
    assert found == {"zero2-offload": (2, 0.0), **{f"zero{stage}": (stage, 0.0) for stage in STAGES}}
