"""Read this first: batch -> vectors -> loss -> step -> figures -> checkpoint, on one worker."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.train import TrainConfig
from rayembed.config.wording import counted
from rayembed.data.datasets import read_datasets
from rayembed.data.mixing import batch_plan
from rayembed.data.passes import TextKeys
from rayembed.data.plan import total_batches
from rayembed.data.store import Store
from rayembed.data.tokens import TokenStore
from rayembed.models.dropout import use_quick_dropout
from rayembed.models.encoding import special_tokens
from rayembed.models.families import FAMILIES
from rayembed.models.guide import load_guide
from rayembed.models.in_context import reader_of
from rayembed.models.loading import prepare_for_training
from rayembed.models.pairs import pair_layout
from rayembed.models.probe import least_cosine, probe, write_probe
from rayembed.models.shared_casts import share_casts
from rayembed.models.trained import build_model, build_tokenizer, in_full, save_model
from rayembed.tracking.metrics import MetricsLog
from rayembed.tracking.progress import Progress
from rayembed.training.alarms import Alarms, Judge
from rayembed.training.allocation import give_back_freed_memory
from rayembed.training.batches import Batch, BatchSource
from rayembed.training.chunk_size import probed_tokens
from rayembed.training.compiling import compile_layers
from rayembed.training.engine import Engine
from rayembed.training.grad_cache import cached_backward
from rayembed.training.in_context import InContext
from rayembed.training.memory import optimizer_bytes
from rayembed.training.objective import Objective, negatives_per_query
from rayembed.training.packed import equal_chunks, reads_packed
from rayembed.training.pauses import Pauses, Report, Told, last_evaluation, no_checkpoint, told_nobody
from rayembed.training.saves import never
from rayembed.training.turns import Turns


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What one worker is told: its place among the workers, and the folders of the job."""

    rank: int
    world_size: int
    device: torch.device
    rows: Path
    tokens: Path
    parts: tuple[str, ...]
    train_folder: Path
    model_folder: Path
    probe_texts: tuple[tuple[str, str], ...]
    """Queries with a positive of theirs."""

    notice: Callable[[], bool] = never
    """Whether a worker's machine will be taken away; called by all workers at the same steps."""

    dev: Path | None = None
    """Folder of the dev split. None: nothing is evaluated."""

    base: Path | None = None
    """File that worker 0 writes the base model's figures to, for other trainings. None: nowhere."""

    base_figures: dict[str, float] | None = None
    """What that file held when the job started; the base model is then not evaluated again."""

    told: Told = told_nobody
    """Takes the figures of evaluations that no checkpoint is made of."""

    checkpoint_of: Callable[[int], AbstractContextManager[Path]] = no_checkpoint
    """Folder of the checkpoint that was made of an evaluation, by its step; for train.load_best_model_at_end."""


def train(experiment: Experiment, worker: Worker, *, resume_from: Path | None, checkpoint: Report) -> None:
    """Trains to the end and writes the model.

    Args:
        experiment: its `train` section is there.
        worker: this worker's place and folders.
        resume_from: a checkpoint of this run, of any number of workers. None: from the base model.
        checkpoint: called by all workers where a checkpoint is due.

    Raises:
        FloatingPointError: the loss or the gradient is not a number; the message names step, batch and rows.
        LeftError: a worker was asked to leave by SIGTERM; a checkpoint was made before.
    """
    config = experiment.train
    assert config is not None
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)  # where bitsandbytes puts a base in 4 bits
    source = batch_source(experiment, worker)
    last = total_batches(
        source.plan,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        accumulation=config.gradient_accumulation_steps,
    )
    total_steps = last // config.gradient_accumulation_steps
    model = trainable(experiment)
    guide = load_guide(experiment)
    guide = None if guide is None else guide.to(worker.device)
    source = replace(source, packed=reads_packed(config, model.to(worker.device), guide))  # before ZeRO 3 spreads it
    compile_layers(model, config)
    settings = deepspeed_settings(experiment, workers=worker.world_size)
    if config.tokens_per_chunk == "probe":
        source = replace(source, tokens_per_chunk=_probed_chunk(config, settings, source, model, worker))
    objective = Objective(experiment, guide=guide)
    engine = Engine(model, config, settings, total_steps=total_steps, device=worker.device)
    found = {"step": 0, "workers": worker.world_size} if resume_from is None else engine.load(resume_from)
    with _log(worker, found, _opening(experiment, source, total_steps, found)) as log:
        pauses = Pauses(experiment, worker, engine, checkpoint, log, found=found, total_steps=total_steps)
        if not pauses.at(found["step"]):
            _steps(experiment, worker, source, engine, objective, pauses, log)
    if pauses.written_step:
        with worker.checkpoint_of(pauses.written_step) as folder:
            engine.load(folder)
    _finish(experiment, worker, engine, as_built=pauses.written_step == 0)


def _log(worker: Worker, found: dict[str, Any], opening: str) -> AbstractContextManager[MetricsLog | None]:
    """Of worker 0, which also tells what is begun; the others have none."""
    if worker.rank:
        return nullcontext()
    logging.getLogger("rayembed").info(opening)
    return MetricsLog(worker.train_folder, last_step=found["step"], last_evaluation=last_evaluation(found))


def _steps(
    experiment: Experiment,
    worker: Worker,
    source: BatchSource,
    engine: Engine,
    objective: Objective,
    pauses: Pauses,
    log: MetricsLog | None,
) -> None:
    config, done, total_steps = experiment.train, pauses.step, pauses.total_steps
    assert config is not None
    accumulation = config.gradient_accumulation_steps
    progress = Progress("train", total_steps, unit="steps", done=done, every_seconds=15)
    meter, saves, alarms, names = pauses.meter, pauses.saves, Alarms(), list[str]()
    batches = source.ahead(done * accumulation, total_steps * accumulation)
    for number, host_batch in enumerate(batches, start=done * accumulation):
        _seed_dropout(experiment.seed, number, worker.rank)
        batch = host_batch.to(worker.device)
        if engine.stage == 3 and source.tokens_per_chunk is not None and not config.grad_cache:  # that does it itself
            batch = equal_chunks(batch)
        judge = Judge(partial(objective, batch=batch, step=done))
        meter.add(_backward(engine, batch, judge, cached=config.grad_cache), host_batch)
        names += [batch.dataset.name] if batch.dataset.name not in names else []
        learning_rate = engine.learning_rate
        if (number + 1) % accumulation:
            engine.step()
            continue
        done = (number + 1) // accumulation
        reading = meter.read(worker.world_size, saves.flags())
        if reading.broken:  # on all workers alike, and before the weights are touched
            first = number + 1 - accumulation
            raise FloatingPointError(_broken(worker, source, done, [first + place for place in reading.broken]))
        saves.add(reading.figures["loss"])
        engine.step()
        if not (math.isfinite(engine.grad_norm) or engine.scales_loss):  # no checkpoint may hold such weights
            raise FloatingPointError(f"the gradient norm of step {done} is {engine.grad_norm}; {_REMEDY}")
        figures = {
            "step": done,
            "epoch": (number + 1) / source.plan.batches_per_epoch,
            **reading.figures,
            "learning_rate": learning_rate,
            "grad_norm": engine.grad_norm,
            "negatives_per_query": negatives_per_query(experiment, batch.dataset),
        }
        if log is not None:
            now, of = done % config.logging_steps == 0 or done == total_steps, ", ".join(names)
            raised = alarms.raised(figures, spread=judge.spread() if now else None, dataset=batch.dataset)
            log.write(figures, dataset=of, alarms=raised)
            progress.add(1, _detail(figures, of), force=now)
        names = []
        if pauses.at(done, reading.flags):
            break


def _backward(engine: Engine, batch: Batch, judge: Judge, *, cached: bool) -> torch.Tensor:
    """The loss of a batch, whose gradient is on its way to the weights."""
    if cached:
        return cached_backward(engine, batch.inputs, judge)
    loss = judge(engine(batch.inputs))
    engine.backward(loss)
    return loss


_REMEDY = (
    "nothing was saved of it, and the last checkpoint is kept. Lower train.learning_rate, raise train.temperature, or "
    "train in bf16 or float32 instead of fp16"
)


def _broken(worker: Worker, source: BatchSource, step: int, batches: list[int], *, most: int = 20) -> str:
    """Which rows gave a loss that is not a number."""
    store, named = Store.open(worker.rows), []
    for number in batches:
        rows = source.plan.rows(number)
        ids = store.take(rows[:most], ["query_id"]).column("query_id").to_pylist()
        names = ", ".join(str(row if name is None else name) for name, row in zip(ids, rows.tolist(), strict=False))
        more = f" and {counted(len(rows) - most, 'other')}" if len(rows) > most else ""
        named.append(f"batch {number} (rows {names}{more})")
    return f"the loss of step {step} is not finite in {'; '.join(named)}; {_REMEDY}"


def batch_source(experiment: Experiment, worker: Worker) -> BatchSource:
    """The worker's batches, by the experiment's settings."""
    config = experiment.train
    assert config is not None
    tokens, rows = TokenStore(worker.tokens, worker.parts), Store.open(worker.rows)
    datasets, data = read_datasets(rows, experiment), experiment.data
    tokenizer = build_tokenizer(experiment)
    reads_pairs = FAMILIES[experiment.model.family].reads == "pairs"
    return BatchSource(
        tokens=tokens,
        datasets=datasets,
        plan=batch_plan(
            datasets,
            experiment,
            lengths=tokens.lengths() if data.length_grouping else None,
            keys=TextKeys.of(rows) if data.no_duplicates_within_batch else None,
        ),
        rank=worker.rank,
        world_size=worker.world_size,
        shuffle_ratio=data.shuffle_ratio,
        special_tokens=(0, 0) if reads_pairs else special_tokens(tokenizer),
        distill=config.knowledge_distillation,
        layout=pair_layout(tokenizer, experiment) if reads_pairs else None,
        in_context=_in_context(experiment, rows, tokenizer),
        pad_token=int(tokenizer.pad_token_id),
        padding_side=tokenizer.padding_side,
        pad_to_multiple_of=experiment.data.pad_to_multiple_of,
        sub_batch_size=config.sub_batch_size,
        tokens_per_chunk=experiment.tokens_per_chunk(),
        pin_memory=worker.device.type == "cuda",
    )


def _probed_chunk(
    config: TrainConfig, settings: dict[str, Any], source: BatchSource, model: nn.Module, worker: Worker
) -> int:
    half = torch.float16 if config.fp16 else torch.bfloat16
    in_half = config.fp16 or config.bf16 or settings.get("bf16", {}).get("enabled", False)
    trained = sum(own.numel() for own in model.parameters() if own.requires_grad)
    return probed_tokens(
        source,
        model,
        dtype=half if in_half else torch.float32,
        device=worker.device,
        folder=worker.train_folder,
        coming_bytes=optimizer_bytes(trained, config, settings["zero_optimization"], worker.world_size),
    )


def _in_context(experiment: Experiment, rows: Store, tokenizer: PreTrainedTokenizerBase) -> InContext | None:
    reader = reader_of(experiment, tokenizer)
    if reader is None:
        return None
    length = experiment.data.query_max_len
    return InContext(rows=rows, reader=reader, model=experiment.model, query_max_len=length, seed=experiment.seed)


def _seed_dropout(seed: int, batch: int, rank: int) -> None:
    """Dropout masks as a function of seed, batch and worker, so that a resumed run draws the same ones."""
    state = np.random.SeedSequence([seed, batch, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))


def _opening(experiment: Experiment, source: BatchSource, total_steps: int, found: dict[str, Any]) -> str:
    plan = source.plan
    negatives = " or ".join(counted(number, "negative") for number in _negatives(experiment, source))
    resumed = f", resumed after step {found['step']:,}" if found["step"] else ""
    if found["workers"] != source.world_size:
        resumed += f", which was saved by {counted(found['workers'], 'worker')}"
    return (
        f"train: {counted(plan.num_rows, 'row')}, batches of {counted(plan.global_batch_size, 'query')} on "
        f"{counted(source.world_size, 'worker')}, {negatives} a query, {counted(total_steps, 'step')}{resumed}; "
        f"{counted(plan.rows_left_out, 'row')} an epoch in no whole batch"
    )


def _negatives(experiment: Experiment, source: BatchSource) -> list[int]:
    return sorted({negatives_per_query(experiment, dataset) for dataset in source.datasets.items})


def _detail(figures: dict[str, float], dataset: str) -> str:
    of = f" of {dataset}" if dataset else ""
    return (
        f"loss {figures['loss']:.4f}{of} | {figures['queries_per_second']:.1f} queries/s | "
        f"{figures['tokens_per_second']:,.0f} tokens/s | padding {100 * figures['padding_share']:.0f} %"
    )


def trainable(experiment: Experiment) -> nn.Module:
    """The experiment's model as it is before its first step, on the CPU."""
    config = experiment.train
    assert config is not None
    model = _build(experiment)
    prepare_for_training(
        model,
        family=experiment.model.family,
        fix_position_embedding=config.fix_position_embedding,
        gradient_checkpointing=config.gradient_checkpointing,
        fix_encoder=experiment.m3 is not None and experiment.m3.fix_encoder,
    )
    if not config.torch_compile:  # which makes one kernel of dropout and what is around it
        use_quick_dropout(model)
    share_casts(model)
    return model


def _build(experiment: Experiment) -> nn.Module:
    torch.manual_seed(experiment.seed)  # weights that the checkpoint lacks are the same wherever the model is built
    return build_model(experiment)


def _finish(experiment: Experiment, worker: Worker, engine: Engine, *, as_built: bool) -> None:
    """Writes the model and, for the check at export, the vectors that its trained weights give here and now.

    With `as_built` the model as it was before its first step.
    """
    give_back_freed_memory()
    tokenizer, in_4bit = build_tokenizer(experiment), experiment.lora is not None and experiment.lora.load_in_4bit
    turns = Turns(worker.train_folder, rank=worker.rank, device=worker.device)
    model = None
    if worker.rank == 0:
        model = _build(in_full(experiment))  # of its own: ZeRO 3 must not be run on one worker alone
    turns.wait()
    own = {} if model is None else dict(model.named_parameters())
    for name, value in engine.trained():
        if own and not as_built:
            own[name].data.copy_(value)
    if model is not None:
        save_model(model, tokenizer, experiment, worker.model_folder)  # first: what was trained for hours is kept
        found = _probed(model, tokenizer, experiment, worker)
        write_probe(worker.train_folder, worker.probe_texts, found)
        if in_4bit and not as_built:
            del model
            logging.getLogger("rayembed").info(_rounding(engine, tokenizer, experiment, worker, found))
    turns.wait()


def _probed(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, worker: Worker
) -> NDArray[np.float32]:
    try:
        return probe(model.to(worker.device), tokenizer, worker.probe_texts, experiment)
    except torch.OutOfMemoryError:  # it lies there beside what training holds, and a base in 4 bits is whole again
        logging.getLogger("rayembed").warning(
            "train: %s has no room for the whole model; the vectors for the check at export are computed on the CPU",
            worker.device,
        )
    return probe(model.cpu(), tokenizer, worker.probe_texts, experiment)


def _rounding(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    experiment: Experiment,
    worker: Worker,
    found: NDArray[np.float32],
) -> str:
    """What the 4 bits of the base changed, in words."""
    try:
        rounded = probe(engine.module.eval(), tokenizer, worker.probe_texts, experiment)
    except RuntimeError as error:  # a line of the log is not worth the run
        return f"train: the adapter was merged into the base as it was before its 4 bits (not compared: {error})"
    if found.ndim == 1:
        change = f"scores differ by up to {np.abs(rounded - found).max():.4f}"
    else:
        change = f"the lowest cosine between vectors is {least_cosine(rounded, found):.6f}"
    return f"train: the adapter was merged into the base as it was before its 4 bits; of the probe's texts, {change}"
