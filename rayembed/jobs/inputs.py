"""Which training rows a job reads: by default what the job before it wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.uris import public_name
from rayembed.data.datasets import Dataset, Datasets, read_datasets
from rayembed.data.mixing import batch_plan
from rayembed.data.passes import TextKeys
from rayembed.data.plan import Plan
from rayembed.data.prepare import prepare, prepare_rows
from rayembed.data.problems import Report
from rayembed.data.store import Store
from rayembed.data.tasks import OF_OWN_KIND, STS
from rayembed.training.objective import negatives_per_query

LONG = 2**30  # tokens: longer than any text


class NotYetError(ValueError):
    """A job reads what another one, of which the experiment has a section, has not written yet."""


def training_rows(experiment: Experiment, *, after: tuple[str, ...]) -> tuple[Store, str]:
    """The rows to score or train on, checked.

    Args:
        experiment: which sections it has decides which jobs ran before.
        after: jobs that may have written the rows, the latest first: ("score", "mine").

    Returns:
        The rows, and where they come from.

    Raises:
        ValueError: the rows have errors, or a job before this one has a section but has not run.
    """
    out = Path(experiment.output_dir)
    for job in after:
        if getattr(experiment, job) is None:
            continue
        if not (out / job).is_dir():
            raise NotYetError(
                f"{out / job} is not there, and the experiment has a section {job}; run `rayembed {job}` first (or "
                f"`rayembed run`), or remove the section"
            )
        report = Report()
        rows = prepare_rows([str(out / job)], Path(experiment.cache()), experiment.encode.queries_per_unit, report)
        report.raise_if_errors()
        return rows, str(out / job)
    prepared = prepare(experiment, corpus=False, evaluation=False)
    prepared.report.raise_if_errors()
    if prepared.rows is None:
        raise ValueError("there are no training rows; set data.train to files, folders or globs")
    return prepared.rows, ", ".join(map(public_name, experiment.data.train))


def planned_rows(experiment: Experiment, *, after: tuple[str, ...]) -> tuple[Store, str]:
    """The rows as far as they are known now, for --dry-run: data.train where a job before this one has not run."""
    if not coming_rows(experiment, after=after):
        return training_rows(experiment, after=after)
    waiting = [job for job in after if getattr(experiment, job) is not None]
    rows, source = training_rows(experiment, after=())
    return rows, f"{source} (after {' and '.join(reversed(waiting))})"


def coming_rows(experiment: Experiment, *, after: tuple[str, ...]) -> tuple[str, ...]:
    """What a record of a job says of its rows, where `planned_rows` does not know them yet: see `folders.state`."""
    waiting = [job for job in after if getattr(experiment, job) is not None]
    return ("rows",) if waiting and not (Path(experiment.output_dir) / waiting[0]).is_dir() else ()


def not_done(experiment: Experiment, job: str) -> bool:
    """Whether the experiment has a section of a job that has written nothing yet."""
    return getattr(experiment, job) is not None and not (Path(experiment.output_dir) / job).is_dir()


def check_rows(experiment: Experiment, rows: Store, *, coming: tuple[str, ...] = ()) -> None:
    """Refuses rows that the settings of training cannot be used with, before anything starts.

    Args:
        experiment: its `train` section is there.
        rows: the training rows.
        coming: jobs that will run before training: mine brings negatives, score brings scores.

    Raises:
        ValueError: no negatives where the group needs some, no scores where distillation needs them, too few rows.
    """
    config, datasets = experiment.train, read_datasets(rows, experiment)
    assert config is not None
    planned_batches(experiment, rows, datasets)
    deepspeed_settings(experiment)
    for dataset in datasets.items:
        _check_dataset(experiment, dataset)
    groups = {dataset.name: dataset.group_size for dataset in datasets.items}
    for part in rows.iter_parts(["query", "pos", "neg", "type", "dataset", "pos_scores", "neg_scores"]):
        for row in part.to_pylist():
            if row["type"] not in OF_OWN_KIND:
                group = groups[row["dataset"] if "" not in groups else ""]
                _check_row(experiment, row, group, coming)


def planned_batches(experiment: Experiment, rows: Store, datasets: Datasets) -> Plan:
    """The batches as far as they are known before texts are tokenised: as if all texts were long.

    Raises:
        ValueError: the rows fill no batch.
    """
    keys = TextKeys.of(rows) if experiment.data.no_duplicates_within_batch else None
    return batch_plan(datasets, experiment, lengths=np.full(rows.num_rows, LONG, np.int32), keys=keys)


def _check_dataset(experiment: Experiment, dataset: Dataset) -> None:
    train, of = experiment.train, f" of dataset {dataset.name!r}" if dataset.name else ""
    assert train is not None
    if dataset.type != STS:  # the experiment's checks, with what this dataset has of its own
        own: dict[str, Any] = {"loss_type": dataset.loss, "no_in_batch_neg": dataset.no_in_batch_neg}
        replace(experiment, train=replace(train, **own))
    elif experiment.m3 is not None and experiment.m3.fix_encoder:
        raise ValueError(f"the rows{of} are scored pairs, which train dense vectors; set m3.fix_encoder: false")
    if dataset.type == STS and experiment.trains_reranker():
        raise ValueError(f"the rows{of} are scored pairs, which train embedders; model.family is a reranker")
    if dataset.type != STS and negatives_per_query(experiment, dataset) == 0:
        own_group = (
            ""
            if experiment.trains_reranker()
            else " or train.per_device_train_batch_size, or set train.no_in_batch_neg: false"
        )
        raise ValueError(
            f"these settings leave no negative at all{of}, and the loss would be 0: raise data.train_group_size"
            f"{own_group}"
        )
    if train.knowledge_distillation and dataset.group_size == 1 and dataset.type not in OF_OWN_KIND:
        raise ValueError("train.knowledge_distillation needs passages to compare; set data.train_group_size above 1")


def _check_row(experiment: Experiment, row: dict[str, Any], group: int, coming: tuple[str, ...]) -> None:
    train = experiment.train
    assert train is not None
    if group > 1 and not row["neg"] and "mine" not in coming:
        advice = "add a section mine" if experiment.mine is None else "mine found none: widen its range or corpus"
        raise ValueError(
            f"data.train_group_size (of its dataset) is {group}, but the row of query {row['query'][:80]!r} has no "
            f"negatives; {advice}, or set data.train_group_size: 1 (in-batch negatives alone)"
        )
    scored = row["pos_scores"] is not None and row["neg_scores"] is not None and "mine" not in coming
    if train.knowledge_distillation and not scored and "score" not in coming:
        raise ValueError(
            f"train.knowledge_distillation is true, but the row of query {row['query'][:80]!r} has no teacher "
            "scores; add a section score, or set it to false"
        )
