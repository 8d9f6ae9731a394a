"""The job `check`: reads all data of the experiment and says what is wrong, what is unusual, and how much there is.

Every other job makes the same reading before it starts a worker; it is cached, so it costs once.
"""

import logging
import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.config.uris import public_name
from rayembed.data.datasets import read_datasets
from rayembed.data.mixing import MixedPlan
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.jobs.evaluate_tasks import read_tasks
from rayembed.jobs.inputs import check_rows, planned_batches
from rayembed.jobs.mine import check_window
from rayembed.jobs.passed_through import in_words, passed_through
from rayembed.jobs.rerank import check_retriever
from rayembed.jobs.tokenize import longest_texts
from rayembed.jobs.train import check_model
from rayembed.models.loading import check_length, load_config, pooling_of, tokenizer_of

logger = logging.getLogger(__name__)
SAMPLE = 2000  # texts whose tokens are counted; a corpus of millions is not tokenised for a warning


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Checks data and model.

    Args:
        experiment: all sections.
        overwrite: has no meaning here; every job takes it.

    Returns:
        OUTPUT_DIR/check.txt: what was logged.

    Raises:
        DataError: the data have errors; the message lists them by file, line and field.
        ValueError: the rows cannot be trained on with these settings.
        FileNotFoundError: a file or the model is not there.
    """
    _check_models(experiment)
    _check_sections(experiment)
    prepared = prepare(experiment)
    read_tasks(experiment, prepared.report)
    if experiment.mine is not None:
        prepared.report.warnings.drop("rows without negatives")  # that is what mine is for
    text = prepared.report.summary()
    path = Path(experiment.output_dir) / "check.txt"
    write_atomic(path, (text + "\n").encode())  # also when it lists errors: no all-clear of an earlier day stays
    prepared.report.raise_if_errors()
    lines = [
        text,
        f"model {experiment.model.name_or_path}, pooling {pooling_of(experiment.model)}",
        *_lengths(experiment, prepared),
    ]
    for job in ("mine", "score"):
        if prepared.rows is not None and getattr(experiment, job) is not None:
            passed = in_words(passed_through(prepared.rows, job))
            lines += [f"{job}: {passed}"] if passed else []
    if prepared.rows is not None and prepared.corpus is not None and experiment.mine is not None:
        lines += _window(experiment.mine, prepared.rows, prepared.corpus)
    if prepared.rows is not None and experiment.mine is None:
        lines += _missing_negatives(experiment, prepared.rows)
    if prepared.rows is not None and experiment.train is not None:
        coming = tuple(job for job in ("mine", "score") if getattr(experiment, job) is not None)
        check_rows(experiment, prepared.rows, coming=coming)
        check_model(experiment)
        lines += _left_out(experiment, prepared.rows)
    summary = "\n".join(line for line in lines if line)
    for line in summary.splitlines():
        logger.info("check: %s", line)
    write_atomic(path, (summary + "\n").encode())
    return path


def _check_models(experiment: Experiment) -> None:
    """Refuses models that are not there."""
    load_config(experiment.model.name_or_path, trust_remote_code=experiment.model.trust_remote_code)
    if experiment.score is not None:
        load_config(experiment.score.model, trust_remote_code=experiment.score.trust_remote_code)
    if experiment.mine is not None and experiment.mine.model is not None:
        load_config(experiment.mine.model, trust_remote_code=experiment.model.trust_remote_code)
    if experiment.evaluate is not None and experiment.evaluate.retriever is not None:
        check_retriever(experiment)


def _check_sections(experiment: Experiment) -> None:
    """Refuses sections whose data are not named, and lengths that the model cannot read."""
    if experiment.evaluate is not None and experiment.data.evaluation is None and not experiment.evaluate.tasks:
        raise ValueError(
            "the experiment has a section evaluate; set data.evaluation to a BEIR folder, or evaluate.tasks, or remove "
            "the section"
        )
    on_this_machine = experiment.ray.address is None and "RAY_ADDRESS" not in os.environ
    if experiment.ray.use_gpu and on_this_machine and torch.cuda.device_count() < experiment.ray.num_workers:
        raise ValueError(
            f"ray.use_gpu with ray.num_workers {experiment.ray.num_workers} needs as many GPUs; this machine has "
            f"{torch.cuda.device_count()}. Set ray.use_gpu: false, lower ray.num_workers, or give ray.address"
        )
    wanting = [job for job in ("mine", "score", "train") if getattr(experiment, job) is not None]
    if wanting and not experiment.data.train:
        raise ValueError(f"the experiment has a section {wanting[0]}; set data.train to files, folders or globs")
    for setting, length in (longest_texts if experiment.trains_reranker() else _limits)(experiment).items():
        check_length(
            experiment.model.name_or_path, length, setting, trust_remote_code=experiment.model.trust_remote_code
        )


def _limits(experiment: Experiment) -> dict[str, int]:
    """Tokens kept of a text, by the setting that says so: in training, and in encoding where it differs."""
    limits = {}
    for side in ("query", "passage"):
        limits[f"data.{side}_max_len"] = getattr(experiment.data, f"{side}_max_len")
        if experiment.max_len(side) != limits[f"data.{side}_max_len"]:
            limits[f"encode.{side}_max_len"] = experiment.max_len(side)
    return limits


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    sources = [*experiment.data.train, *experiment.data.corpus, *filter(None, [experiment.data.evaluation])]
    for task in experiment.evaluate.tasks if experiment.evaluate is not None else ():
        sources += [*task.train, *task.test]
    return f"check: reads {', '.join(dict.fromkeys(map(public_name, sources))) or 'nothing (data is empty)'}"


def _lengths(experiment: Experiment, prepared: Prepared) -> list[str]:
    """Token lengths of queries and passages, and the share that is cut."""
    model = experiment.model
    tokenizer = tokenizer_of(model)
    lines = []
    for side, texts in _samples(experiment, prepared).items():
        ids = tokenizer(texts, verbose=False)["input_ids"]
        lengths = np.array([len(tokens) for tokens in ids])
        cuts = ", ".join(
            f"{100 * float((lengths > limit).mean()):.1f} % longer than {limit} ({setting}) are cut"
            for setting, limit in _limits(experiment).items()
            if side in setting
        )
        plural = {"query": "queries", "passage": "passages"}[side]
        lines.append(
            f"{plural}: {lengths.mean():.0f} tokens on average, {int(np.percentile(lengths, 95))} at the 95th "
            f"percentile; {cuts} (of {len(texts):,} sampled)"
        )
    return lines


def _samples(experiment: Experiment, prepared: Prepared) -> dict[str, list[str]]:
    samples = {}
    if prepared.rows is not None and prepared.rows.num_rows:
        rows = _sample(prepared.rows, ["query", "prompt"])
        samples["query"] = [query_text(experiment.model, row["query"], row["prompt"]) for row in rows]
    if prepared.corpus is not None and prepared.corpus.num_rows:
        rows = _sample(prepared.corpus, ["text"])
        samples["passage"] = [passage_text(experiment.model, row["text"]) for row in rows]
    return samples


def _sample(store: Store, columns: list[str]) -> list[dict[str, str]]:
    count = min(SAMPLE, store.num_rows)
    rows = np.random.default_rng(0).choice(store.num_rows, count, replace=False)
    return list(store.take(np.sort(rows), columns).to_pylist())


def _window(config: MineConfig, rows: Store, corpus: Store) -> list[str]:
    """What mining will do that one may not expect: a window beyond the corpus, negatives of the rows replaced."""
    first, last = map(int, config.range_for_sampling.split("-"))
    lines = []
    check_window(config, corpus)
    if min(last, corpus.num_rows) - first < config.negative_number:
        filled = config.fill_up and last < corpus.num_rows  # with what ranks after the window
        lines.append(
            f"warning: mine.range_for_sampling {config.range_for_sampling} holds fewer than {config.negative_number} "
            f"of the {corpus.num_rows:,} passages: the other negatives are "
            + ("drawn at random (mine.fill_up)" if filled else "missing")
        )
    given = sum(pc.sum(pc.list_value_length(part.column("neg"))).as_py() or 0 for part in rows.iter_parts(["neg"]))
    if given:
        lines.append(
            f"warning: mine will replace the {given:,} negatives that the rows bring; leave mine out to use them"
        )
    return lines


def _left_out(experiment: Experiment, rows: Store) -> list[str]:
    """Rows that fill no whole batch, where they are many."""
    plan = planned_batches(experiment, rows, read_datasets(rows, experiment))
    notes = plan.notes() if isinstance(plan, MixedPlan) else []
    if plan.rows_left_out < rows.num_rows / 20:
        return notes
    return [
        *notes,
        f"warning: {plan.rows_left_out:,} of {rows.num_rows:,} rows fill no whole batch of {plan.global_batch_size:,} "
        "queries and sit out each epoch, other ones each time; a smaller train.per_device_train_batch_size uses more",
    ]


def _missing_negatives(experiment: Experiment, rows: Store) -> list[str]:
    needed = experiment.data.train_group_size - 1
    short = sum(
        pc.sum(pc.less(pc.list_value_length(part.column("neg")), needed)).as_py() or 0
        for part in rows.iter_parts(["neg"])
    )
    if experiment.train is None or not short:
        return []
    return [
        f"{short:,} of {rows.num_rows:,} rows have fewer than {needed} negatives (data.train_group_size - 1): theirs "
        "are used more than once in a group; rows without any are refused by train"
    ]
