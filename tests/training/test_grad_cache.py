"""Weights, gradient norms and losses of GradCache are those of plain torch on whole batches, whatever is combined."""

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, BertModel

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.families import LoraConfig, M3Config
from rayembed.config.model import Family, ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.models.chunks import TokenBatch, pack_chunks, pad_chunks
from rayembed.models.packable import why_not_packed
from rayembed.training.batches import Batch
from rayembed.training.engine import Engine
from rayembed.training.grad_cache import cached_backward
from rayembed.training.loop import trainable
from rayembed.training.objective import Objective
from rayembed.training.optimizers import parameter_groups
from tests.models.tiny_decoders import qwen_tokenizer, save_decoder
from tests.training.made_batches import different_keys, one_dataset, worker_batch
from tests.training.processes import in_workers
from tests.training.small_training import DEEPSPEED, Run, experiment, random_rows, train_one, write_row_tokens

QUERIES, GROUP, STEPS, TOKENS = 4, 2, 3, 40
SETTINGS: dict[str, Any] = {
    "global_batch_size": QUERIES,
    "temperature": 0.1,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,  # so large that gradients of nothing but rounding do not move a weight
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
}
OTHERS: dict[str, dict[str, Any]] = {
    "m3": {"family": "m3", "stages": [0, 3]},
    "reranker": {"family": "reranker-encoder", "stages": [2]},
    "accumulated": {"stages": range(4), "train": {"gradient_accumulation_steps": 2}},
    "offloaded": {"stages": [2], "train": {"deepspeed": str(DEEPSPEED / "zero2-offload.json")}},
    "bfloat16": {"stages": [1], "train": {"bf16": True}},
    "packed": {"stages": range(4), "train": {"packed": True}},
    "scored pairs": {"stages": [3], "dataset": {"type": "sts", "loss": "cosent", "group_size": 1}},
}
Found = tuple[list[Tensor], list[float], list[float]]  # weights, gradient norms, losses


@pytest.fixture(scope="module")
def encoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller yet."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(folder)
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), qwen_tokenizer(), num_hidden_layers=1)


def setup_of(
    base: Path,
    *,
    stage: int = 0,
    family: Family = "encoder",
    dropout: float = 0.0,
    checkpointing: bool = False,
    **train: Any,  # noqa: ANN401 - any setting of the section
) -> Experiment:
    told = {**SETTINGS, "gradient_checkpointing": checkpointing, "grad_cache": True, **train}
    told.setdefault("deepspeed", str(DEEPSPEED / f"zero{stage}.json"))
    causal = family == "decoder"
    return Experiment(
        output_dir="unused",
        data=DataConfig(train_group_size=GROUP),
        ray=RayConfig(num_workers=dist.get_world_size()),
        train=TrainConfig(**told),
        model=ModelConfig(
            name_or_path=str(base), family=family, dropout=dropout, pooling="last_token" if causal else "mean"
        ),
        lora=LoraConfig(lora_rank=4, lora_dropout=dropout) if causal else None,
        m3=M3Config(flops_weight=0.1, self_distill_start_step=1) if family == "m3" else None,
    )


def built(setup: Experiment) -> nn.Module:
    assert setup.train is not None
    model = trainable(setup)
    assert not setup.train.packed or why_not_packed(model, training=True) is None
    return model


def batch_of(setup: Experiment, number: int, **dataset: Any) -> Batch:  # noqa: ANN401
    """This worker's part of a global batch, in some chunks, of which not all workers have as many."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(number)

    def texts(count: int) -> TokenBatch:
        longer = torch.arange(count) * 2 // count * 8
        lengths = (torch.randint(2, 10, (count,), generator=draw) + longer).tolist()
        every = [torch.randint(5, 60, (length,), generator=draw).tolist() for length in lengths]
        share = count // world_size
        own = every[rank * share : (rank + 1) * share]
        side = "left" if setup.model.family == "decoder" else "right"
        if setup.train is not None and setup.train.packed:
            return pack_chunks(own, tokens_per_chunk=TOKENS)
        return pad_chunks(own, pad_token=0, padding_side=side, tokens_per_chunk=TOKENS)

    labels = torch.rand(QUERIES, 1, generator=draw) if dataset else None
    kind = one_dataset(setup, **dataset)
    found = worker_batch(different_keys(QUERIES, kind.group_size), labels, kind, rank, world_size)
    sizes = [QUERIES * GROUP] if setup.trains_reranker() else [QUERIES, QUERIES * kind.group_size]
    return replace(found, inputs=tuple(texts(size) for size in sizes))


def batches(setup: Experiment, **dataset: Any) -> Iterator[tuple[int, Batch]]:  # noqa: ANN401
    assert setup.train is not None
    for number in range(STEPS * setup.train.gradient_accumulation_steps):
        torch.manual_seed(100 * number + dist.get_rank())
        yield number // setup.train.gradient_accumulation_steps, batch_of(setup, number, **dataset)


def plain(setup: Experiment, **dataset: Any) -> Found:  # noqa: ANN401
    """Torch alone: all chunks' graphs at once, gradients of workers averaged by hand."""
    assert setup.train is not None
    model, objective = built(setup), Objective(setup)
    if setup.train.bf16:
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    norms, losses, accumulation = [], [], setup.train.gradient_accumulation_steps
    for number, (step, batch) in enumerate(batches(setup, **dataset)):
        loss = objective(model(batch.inputs), batch, step=step)
        (loss / accumulation).backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        if (number + 1) % accumulation:
            continue
        for parameter in trained:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        norms.append(float(nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in trained], norms, losses


def cached(setup: Experiment, **dataset: Any) -> Found:  # noqa: ANN401
    assert setup.train is not None
    settings, objective = deepspeed_settings(setup), Objective(setup)
    if settings["zero_optimization"]["stage"] == 3:  # else weights this small are kept whole on each worker
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 500
    engine = Engine(built(setup), setup.train, settings, total_steps=STEPS, device=torch.device("cpu"))
    norms, losses = [], []
    for step, batch in batches(setup, **dataset):
        loss = cached_backward(engine, batch.inputs, partial(objective, batch=batch, step=step))
        losses.append(float(loss))
        if engine.step():
            norms.append(engine.grad_norm)
    return [value.clone() for _, value in engine.trained()], norms, losses


def differences(one: Found, other: Found) -> tuple[float, float, float]:
    """The largest of weights, and relative of gradient norms and losses; infinite where there are not as many."""
    if [len(found) for found in one] != [len(found) for found in other]:
        return (float("inf"),) * 3
    weights = max(float((a - b).abs().max()) for a, b in zip(one[0], other[0], strict=True))
    norms, losses = (
        max(abs(a - b) / max(1, abs(b)) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in ((one[1], other[1]), (one[2], other[2]))
    )
    return weights, norms, losses


def whole_matrix(encoder: Path, decoder: Path) -> dict[str, tuple[float, float, float]]:
    gc.freeze()  # DeepSpeed collects garbage in every engine of ZeRO 3: half a second of all that was imported
    found = {}
    kinds: tuple[tuple[str, Path, Family], ...] = ("plain", encoder, "encoder"), ("LoRA", decoder, "decoder")
    for (kind, base, family), dropout in product(kinds, (0.0, 0.2)):
        expected = plain(setup_of(base, family=family, dropout=dropout))
        for stage, checkpointing in product(range(4), (False, True)):
            setup = setup_of(base, family=family, dropout=dropout, stage=stage, checkpointing=checkpointing)
            name = f"ZeRO {stage}, {kind}, dropout {dropout}, checkpointing {checkpointing}"
            found[name] = differences(cached(setup), expected)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_the_step_is_that_of_plain_torch(encoder: Path, decoder: Path, workers: int) -> None:
    for found in in_workers(workers, whole_matrix, encoder, decoder):
        assert len(found) == 32
        assert {name: values for name, values in found.items() if not all(value < 1e-5 for value in values)} == {}


def other_kinds(encoder: Path) -> dict[str, tuple[float, float, float]]:
    gc.freeze()
    found = {}
    for name, kind in OTHERS.items():
        dataset = kind.get("dataset", {})
        for stage in kind["stages"]:
            setup = setup_of(encoder, stage=stage, family=kind.get("family", "encoder"), **kind.get("train", {}))
            assert setup.train is not None
            padded = replace(setup, train=replace(setup.train, packed=False))
            found[f"{name}, ZeRO {stage}"] = differences(cached(setup, **dataset), plain(padded, **dataset))
    return found


def test_other_models_and_settings(encoder: Path) -> None:
    for found in in_workers(2, other_kinds, encoder):
        assert len(found) == 14
        limits = {name: 2e-3 if "bfloat16" in name else 1e-5 for name in found}
        assert {name: values for name, values in found.items() if not all(v < limits[name] for v in values)} == {}


def chunk_counts(encoder: Path) -> list[int]:
    setup = setup_of(encoder)
    return [sum(len(texts.chunks) for texts in batch_of(setup, number).inputs) for number in range(STEPS)]


def test_workers_have_other_numbers_of_chunks(encoder: Path) -> None:
    """So that what is told above holds where some pass for nothing."""
    first, second = in_workers(2, chunk_counts, encoder)
    assert first != second
    assert min(first + second) > 1


def loops(runs: Path, plain_setup: Experiment) -> None:
    """The same training without GradCache, with it, and with it but killed and resumed."""
    assert plain_setup.train is not None
    setup = replace(plain_setup, train=replace(plain_setup.train, grad_cache=True))
    runs_of = {name: Run(runs / name, runs / "tokens") for name in ("plain", "cached", "broken")}
    train_one(plain_setup, runs_of["plain"])
    train_one(setup, runs_of["cached"])
    train_one(setup, runs_of["broken"], 2)
    train_one(setup, runs_of["broken"], None, 2)


def test_the_loop_trains_as_without_it_and_goes_on_from_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(18), tiny_model, tmp_path / "tokens")
    told: dict[str, Any] = {"global_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2}
    setup = experiment(
        tiny_model, workers=2, stage=2, learning_rate=1e-3, adam_epsilon=1e-4, tokens_per_chunk=64, **told
    )
    in_workers(2, loops, tmp_path, setup)
    plain_run, cached_run, broken = (Run(tmp_path / name, tmp_path) for name in ("plain", "cached", "broken"))
    assert cached_run.losses() == pytest.approx(plain_run.losses(), abs=1e-5)
    expected = plain_run.weights()
    for name, value in cached_run.weights().items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)
    unbroken = cached_run.weights()
    assert [name for name, value in broken.weights().items() if not torch.equal(value, unbroken[name])] == []
