"""The job `train`: Ray Train workers, one DeepSpeed engine each, from the base model to OUTPUT_DIR/model."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.train import TrainConfig
from rayembed.config.wording import counted
from rayembed.data import mirror
from rayembed.data.copies import registered, shown
from rayembed.data.datasets import read_datasets
from rayembed.data.plan import total_batches
from rayembed.data.storage import working_folder
from rayembed.data.store import Store
from rayembed.jobs import estimates
from rayembed.jobs.as_trial import AsTrial
from rayembed.jobs.checkpoints import Checkpoints, best_in_words, kept, remove_uncounted
from rayembed.jobs.connection import signals_kept
from rayembed.jobs.dev_split import (
    DevSplit,
    dev_split,
    notes,
    plan_in_words,
    told_workers,
)
from rayembed.jobs.folders import state, written_once
from rayembed.jobs.inputs import check_rows, coming_rows, not_done, planned_batches, planned_rows, training_rows
from rayembed.jobs.process_group import ProcessGroup
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.session import log_from_worker, ray_session
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.tokenize import Tokenized, tokenize_rows
from rayembed.jobs.train_reads import on_other_workers, train_section, training_reads
from rayembed.jobs.trained_copy import COPIES, leave, received_settings, sending_before, storage, telling_after
from rayembed.models.adapters import check_adapter
from rayembed.models.guide import check_guide
from rayembed.models.loading import architecture, check_checkpointing, load_config
from rayembed.models.pairs import pair_layout, trained_reading
from rayembed.models.probe import reranker_section
from rayembed.models.rerankers import check_classifier, check_pair_length
from rayembed.models.trained import build_tokenizer
from rayembed.training.allocation import ONE_ARENA, keep_freed_memory
from rayembed.training.compiling import check_compile
from rayembed.training.objective import negatives_per_query
from rayembed.training.optimizers import check_optimizer

logger = logging.getLogger(__name__)
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
RAY_TRAIN: Any = ray.train  # Ray shows type checkers the ScalingConfig and RunConfig of its version 1


class TrainingError(RuntimeError):
    """Training stopped before its end; its last checkpoint is kept."""


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False, trial: AsTrial | None = None) -> Path:
    """Trains; a run that was killed goes on from its last checkpoint.

    Args:
        experiment: sections train, data, model, ray.
        overwrite: train anew where the folder was made from something else.
        trial: of a sweep, that this training is. None: of none.

    Returns:
        OUTPUT_DIR/train: metrics.jsonl, checkpoints/, tensorboard/. The model itself is OUTPUT_DIR/model.

    Raises:
        ValueError: rows, settings or the folder do not fit.
        TrainingError: a worker failed more than ray.max_failures times.
    """
    train_section(experiment)
    rows = training_rows(experiment, after=("score", "mine"))[0] if trial is None else trial.rows
    check_rows(experiment, rows)
    check_model(experiment)
    dev = dev_split(experiment)
    final = Path(experiment.output_dir) / "train"

    def write(folder: Path) -> None:
        for line in [] if dev is None else notes(experiment, dev, rows):
            logger.info("train: %s", line)
        with ray_session(experiment):
            _fit(experiment, tokenize_rows(experiment, rows, dev), rows, folder, dev, trial)

    if final.exists() and not (final.parent / "model").is_dir():
        mirror.reopen(final)
        final.rename(working_folder(final))  # the model was removed: its last steps are done again from a checkpoint
    depends_on, advice = training_reads(experiment, rows, dev), on_other_workers
    return written_once(final, depends_on, write, overwrite=overwrite, experiment=experiment, advice=advice)


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    config = train_section(experiment)
    final, before = Path(experiment.output_dir) / "train", ("score", "mine")
    rows, source = planned_rows(experiment, after=before)
    check_rows(experiment, rows, coming=tuple(job for job in before if not_done(experiment, job)))
    check_model(experiment)
    dev = dev_split(experiment)
    datasets = read_datasets(rows, experiment)
    batches = planned_batches(experiment, rows, datasets)
    total = total_batches(
        batches,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        accumulation=config.gradient_accumulation_steps,
    )
    numbers = sorted({negatives_per_query(experiment, dataset) for dataset in datasets.items})
    negatives = " or ".join(counted(number, "negative") for number in numbers)
    coming, advice = coming_rows(experiment, after=before), on_other_workers
    where = state(final, training_reads(experiment, rows, dev), overwrite=overwrite, coming=coming, advice=advice)
    steps = total // config.gradient_accumulation_steps
    evaluated = "" if dev is None else f"; {plan_in_words(experiment, dev, steps)}"
    cached = " (grad_cache: one chunk of a batch at a time)" if config.grad_cache else ""
    return (
        f"train: {counted(rows.num_rows, 'row')} of {source}, {counted(batches.batches_per_epoch, 'batch')} of "
        f"{counted(batches.global_batch_size, 'query')} an epoch on {experiment.ray.workers_in_words()}, "
        f"{counted(steps, 'step')}, {negatives} a query"
        f"{cached}; {estimates.training(experiment, rows, total)}{evaluated}; {where}"
    )


def check_model(experiment: Experiment) -> None:
    """Refuses a model that these settings cannot train, before a worker starts.

    Raises:
        ValueError: the guide, the adapter, gradient checkpointing or the layout of pairs does not fit; names the
            setting.
        FileNotFoundError: a folder of the settings, or a compiler, is not there.
        ModuleNotFoundError: a package that a setting needs is not there.
    """
    check_guide(experiment)
    _check_engine(experiment)
    _check_architecture(experiment)
    if experiment.trains_reranker():
        pair_layout(build_tokenizer(experiment), experiment)
        config = reranker_section(experiment, experiment.model.name_or_path)
        lengths = "data.query_max_len + data.passage_max_len"
        check_pair_length(config, config.kind, lengths, reading=trained_reading(experiment))
        if config.kind == "reranker":
            check_classifier(config.model, trust_remote_code=config.trust_remote_code)
    dims, remote = train_section(experiment).mrl_dims, experiment.model.trust_remote_code
    if dims:
        width = int(load_config(experiment.model.name_or_path, trust_remote_code=remote).hidden_size)
        if max(dims) > width:
            raise ValueError(f"train.mrl_dims has {max(dims)}, and vectors have {width} dimensions; set at most that")


def _check_engine(experiment: Experiment) -> None:
    config, resources = train_section(experiment), experiment.ray
    settings = deepspeed_settings(experiment)
    zero = settings["zero_optimization"]
    check_compile(config, zero["stage"])
    check_optimizer(config, zero, use_gpu=resources.use_gpu, elastic=resources.elastic)
    fixed = {
        "zero_optimization.elastic_checkpoint": zero.get("elastic_checkpoint"),
        "zero_optimization.parameter_alignment": zero.get("parameter_alignment"),
        "data_types.grad_accum_dtype": settings.get("bf16", {}).get("enabled") and settings.get("data_types"),
    }
    found = [name for name, value in fixed.items() if value and zero["stage"]]
    if resources.elastic and found:
        raise ValueError(
            f"train.deepspeed sets {found[0]}, with which a checkpoint is of one number of workers, and "
            f"ray.num_workers asks for {resources.workers_in_words()}; remove it, or set ray.num_workers to one number"
        )


def _check_architecture(experiment: Experiment) -> None:
    config, lora = train_section(experiment), experiment.lora
    if lora is None and not config.gradient_checkpointing:
        return
    backbone = architecture(experiment.model)
    if config.gradient_checkpointing:
        check_checkpointing(backbone)
    if lora is not None:
        check_adapter(lora, backbone)
        if lora.load_in_4bit and deepspeed_settings(experiment)["zero_optimization"]["stage"] == 3:
            raise ValueError(
                "lora.load_in_4bit needs ZeRO stage 0, 1 or 2, and train.deepspeed says 3, which cuts weights into "
                "parts that bitsandbytes cannot read; set zero_optimization.stage to 2, or lora.load_in_4bit to false"
            )


def _fit(
    experiment: Experiment, tokens: Tokenized, rows: Store, folder: Path, dev: DevSplit | None, trial: AsTrial | None
) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # Ray Train polls its workers every 2 s otherwise
    config, resources = train_section(experiment), experiment.ray
    sooner = resources.elastic and START_TIMEOUT not in os.environ
    if sooner:  # so long Ray waits for a worker that was lost before it goes on with those that are left
        os.environ[START_TIMEOUT] = "10"
    out = Path(experiment.output_dir).resolve()
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "experiment": shipped(experiment),
            "rows": str(rows.folder.resolve()),
            "tokens": str(tokens.folder.resolve()),
            "parts": list(tokens.parts),
            "train_folder": str(folder.resolve()),
            "model_folder": str(out / "model"),
            "probe_texts": _probe_texts(experiment, rows),
            **told_workers(experiment, dev),
            "log": "" if trial is None else trial.name,
            COPIES: registered(),
        },
        torch_config=ProcessGroup(backend="nccl" if resources.use_gpu else "gloo", timeout_s=resources.timeout_s),
        scaling_config=RAY_TRAIN.ScalingConfig(
            num_workers=resources.num_workers,
            elastic_resize_monitor_interval_s=resources.resize_interval_s,
            use_gpu=resources.use_gpu,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": 1} if resources.use_gpu else {}),
            },
        ),
        run_config=RAY_TRAIN.RunConfig(
            name="checkpoints",
            **storage(folder),
            worker_runtime_env={} if resources.use_gpu else {"env_vars": ONE_ARENA},
            callbacks=None if trial is None else [*trial.callbacks],
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=kept(config),
            logging_config=RAY_TRAIN.LoggingConfig(log_level="WARNING"),  # the progress line is ours
        ),
    )
    remove_uncounted(folder / "checkpoints")
    try:
        with signals_kept():
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training stopped: {_cause(error)}\nIts checkpoints are kept in {shown(folder / 'checkpoints')}; run the "
            "same command again to go on from the last one"
        ) from error
    finally:
        if sooner:
            del os.environ[START_TIMEOUT]  # it is of this training
    if config.save_best:
        logger.info(best_in_words(result, out / "train", _kept_by(config)))


def _probe_texts(experiment: Experiment, rows: Store) -> list[tuple[str, str]]:
    count = experiment.export.probe_texts if experiment.export is not None else 64
    first = rows.read_part(0, ["query", "pos"]).slice(0, count // 2).to_pylist()
    return [(row["query"], row["pos"][0] if row["pos"] else row["query"]) for row in first]  # labelled texts have none


def _kept_by(config: TrainConfig) -> str | None:
    """The figure of evaluations that says which checkpoints are kept."""
    return config.metric_for_best_model if config.keeps_by_metric else None


def _cause(error: BaseException) -> str:
    """The innermost reason that Ray wrapped, in its last line."""
    failures = getattr(error, "worker_failures", None) or {}
    reasons = [f"worker {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in failures.items()]
    return "; ".join(reasons) or (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _worker(settings: dict[str, Any]) -> None:
    """Runs in every Ray Train worker."""
    from rayembed.training.loop import Worker, train

    log_from_worker(settings["log"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    settings = received_settings(settings, rank=rank)
    experiment = received(settings["experiment"])
    torch.set_num_threads(experiment.ray.cpus_per_worker)
    if not experiment.ray.use_gpu:
        keep_freed_memory()
    train_folder, model_folder = Path(settings["train_folder"]), Path(settings["model_folder"])
    checkpoint = ray.train.get_checkpoint()
    checkpoints = Checkpoints(
        train_folder / "checkpoints",
        timeout_s=experiment.ray.timeout_s,
        metric=_kept_by(train_section(experiment)),
        resumed_from=None if checkpoint is None else Path(checkpoint.path).name,
    )
    worker = Worker(
        rank=rank,
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        rows=Path(settings["rows"]),
        tokens=Path(settings["tokens"]),
        parts=tuple(settings["parts"]),
        train_folder=train_folder,
        model_folder=model_folder,
        probe_texts=tuple(map(tuple, settings["probe_texts"])),
        notice=lambda: ray.train.get_preemption_info() is not None,
        dev=None if settings["dev"] is None else Path(settings["dev"]),
        base=None if settings["base"] is None else Path(settings["base"]),
        base_figures=settings["base_figures"],
        told=telling_after(checkpoints.tell, train_folder, rank=rank),
        checkpoint_of=checkpoints.of_evaluation,
    )
    with nullcontext() if checkpoint is None else checkpoint.as_directory() as folder, checkpoints.all_sent():
        resume_from = None if folder is None else Path(folder)
        save = sending_before(checkpoints.save, train_folder, rank=rank)
        train(experiment, worker, resume_from=resume_from, checkpoint=save)
        leave(train_folder, model_folder, rank=rank)
