"""Which training rows a job reads: by default what the job before it wrote."""

from pathlib import Path

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.uris import public_name
from rayembed.data.plan import BatchPlan
from rayembed.data.prepare import prepare, prepare_rows
from rayembed.data.problems import Report
from rayembed.data.store import Store
from rayembed.training.objective import negatives_per_query


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
            raise ValueError(
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
    waiting = [job for job in after if getattr(experiment, job) is not None]
    if not waiting or (Path(experiment.output_dir) / waiting[0]).is_dir():
        return training_rows(experiment, after=after)
    rows, source = training_rows(experiment, after=())
    return rows, f"{source} (after {' and '.join(reversed(waiting))})"


def check_rows(experiment: Experiment, rows: Store, *, coming: tuple[str, ...] = ()) -> None:
    """Refuses rows that the settings of training cannot be used with, before anything starts.

    Args:
        experiment: its `train` section is there.
        rows: the training rows.
        coming: jobs that will run before training: mine brings negatives, score brings scores.

    Raises:
        ValueError: no negatives where the group needs some, no scores where distillation needs them, too few rows.
    """
    config, group = experiment.train, experiment.data.train_group_size
    assert config is not None
    BatchPlan(rows.num_rows, experiment.global_batch_size(), experiment.seed)
    deepspeed_settings(experiment)
    if negatives_per_query(experiment) == 0:
        own_group = (
            ""
            if experiment.trains_reranker()
            else (" or train.per_device_train_batch_size, or set train.no_in_batch_neg: false")
        )
        raise ValueError(
            "these settings leave no negative at all, and the loss would be 0: raise data.train_group_size" + own_group
        )
    if config.knowledge_distillation and group == 1:
        raise ValueError("train.knowledge_distillation needs passages to compare; set data.train_group_size above 1")
    for part in rows.iter_parts(["query", "neg", "pos_scores", "neg_scores"]):
        for row in part.to_pylist():
            if group > 1 and not row["neg"] and "mine" not in coming:
                advice = (
                    "add a section mine" if experiment.mine is None else "mine found none: widen its range or corpus"
                )
                raise ValueError(
                    f"data.train_group_size is {group}, but the row of query {row['query'][:80]!r} has no negatives; "
                    f"{advice}, or set data.train_group_size: 1 (in-batch negatives alone)"
                )
            scored = row["pos_scores"] is not None and row["neg_scores"] is not None and "mine" not in coming
            if config.knowledge_distillation and not scored and "score" not in coming:
                raise ValueError(
                    f"train.knowledge_distillation is true, but the row of query {row['query'][:80]!r} has no teacher "
                    "scores; add a section score, or set it to false"
                )
