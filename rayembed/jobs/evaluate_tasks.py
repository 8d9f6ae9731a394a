"""Tasks beside retrieval: reads their rows, encodes the texts of all of them in one pass a model, and judges both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig, TaskConfig
from rayembed.config.uris import public_name
from rayembed.data.prepare import prepare_rows
from rayembed.data.problems import Problem, Report
from rayembed.data.storage import fingerprint
from rayembed.data.store import QUERIES, Store, StoreWriter
from rayembed.data.tasks import CLASS, STS
from rayembed.evaluation.significance import bootstrap_interval
from rayembed.evaluation.tasks import (
    check_classes,
    check_labels,
    check_scores,
    cosines,
    right_answers,
    spearman,
    spearman_interval,
    v_measure,
)
from rayembed.jobs.folders import Reads
from rayembed.jobs.vectors import Wanted, encode_stores

VERSION = 1  # raise it when the same rows give other texts
METRICS = {"sts": "spearman", "classification": "accuracy", "clustering": "v_measure"}
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """A task and its rows, checked."""

    config: TaskConfig
    test: Store
    train: Store | None
    """What the classifier learns from. None: of kinds without one."""

    @property
    def stores(self) -> list[Store]:
        """Of rows: test, then train where there is one."""
        return [self.test, *([] if self.train is None else [self.train])]

    @property
    def num_texts(self) -> int:
        """Texts to encode."""
        return (2 if self.config.kind == "sts" else 1) * sum(store.num_rows for store in self.stores)


def read_tasks(experiment: Experiment, report: Report) -> list[Task]:
    """The tasks of section evaluate with their rows.

    Args:
        experiment: section evaluate; none has no tasks.
        report: takes what is wrong, by file and line; no task is to be used if it has errors.
    """
    tasks, own = [], Report()
    for config in (experiment.evaluate or EvaluateConfig()).tasks:
        test, *train = [
            prepare_rows(
                sources,
                Path(experiment.cache()),
                experiment.encode.queries_per_unit,
                own,
                row_type=STS if config.kind == "sts" else CLASS,
                setting="evaluate.tasks",
            )
            for sources in (config.test, config.train)
            if sources
        ]
        tasks.append(Task(config, test, train[0] if train else None))
    if own.errors.total == 0:
        for task in tasks:
            _check(task, own)
    own.counts = {f"tasks: {name}": number for name, number in own.counts.items()}
    report.merge(own, "tasks")
    return tasks


def _check(task: Task, report: Report) -> None:
    """Notes what would make the metric undefined."""
    try:
        if task.config.kind == "sts":
            check_scores(_scores(task.test))
        elif task.train is None:
            check_labels(_labels(task.test))
        else:
            check_classes(_labels(task.train), _labels(task.test))
    except ValueError as error:
        files = ", ".join(map(public_name, task.config.test))
        report.error("task without a metric", Problem(files, None, f"task {task.config.name!r}", str(error)))


def tasks_reads(tasks: Sequence[Task]) -> Reads:
    """What the figures depend on beside model and seed, for the record of the job: contents, not paths."""
    return {
        task.config.name: {
            "kind": task.config.kind,
            "classifier": task.config.classifier,
            "prompt": task.config.prompt,
            "test": task.test.fingerprint,
            "train": None if task.train is None else task.train.fingerprint,
        }
        for task in tasks
    }


def evaluate_tasks(
    experiment: Experiment, tasks: Sequence[Task], models: Mapping[str, str], *, num_resamples: int
) -> dict[str, dict[str, Any]]:
    """Figures of every task.

    Args:
        experiment: lengths, resources, cache, seed. Its instruction for retrieval is put before no text of a task.
        tasks: with rows.
        models: folder or hub id of "base" and, if there is one, "tuned".
        num_resamples: of the bootstrap of accuracies.

    Returns:
        By name of the task, JSON-ready: kind, metric, a value a model, num_texts (judged; both of a pair), and with
        two models ci95 [low, high] of the difference tuned minus base (not of clustering, which is no mean over texts).
    """
    texts = {store.folder: store for task in tasks for store in _texts(experiment, task)}
    wanted = [Wanted(store, "query") for store in texts.values()]
    vectors = {
        name: dict(zip(texts, encode_stores(_asked(experiment), wanted, model=model), strict=True))
        for name, model in models.items()
    }
    found = {}
    for task in tasks:
        folders = [store.folder for store in _texts(experiment, task)]
        own = {name: [of[folder].all() for folder in folders] for name, of in vectors.items()}
        values, interval = JUDGES[task.config.kind](task, own, experiment.seed, num_resamples)
        found[task.config.name] = {
            "kind": task.config.kind,
            "metric": METRICS[task.config.kind],
            **values,
            **({} if interval is None else {"ci95": list(interval)}),
            "num_texts": texts[folders[0]].num_rows,
        }
    return found


def task_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What metrics.json says of the tasks, a line a task."""
    lines = []
    for name, task in metrics.get("tasks", {}).items():
        figures = f"{task['base']:.4f}"
        if "tuned" in task:
            figures += f" -> {task['tuned']:.4f} ({task['tuned'] - task['base']:+.4f}"
            if "ci95" in task:
                figures += ", 95 % interval {:+.4f} to {:+.4f}".format(*task["ci95"])
            figures += ")"
        lines.append(f"{name}: {task['metric']} {figures}")
    return lines


def _asked(experiment: Experiment) -> Experiment:
    """The experiment without what it puts before queries of retrieval: instruction, and examples of family icl."""
    icl = experiment.icl and replace(experiment.icl, examples_for_task=[])
    return replace(experiment, icl=icl, model=replace(experiment.model, query_instruction_for_retrieval=None))


def _texts(experiment: Experiment, task: Task) -> list[Store]:
    """A store of queries for each of the task's stores of rows."""
    return [_texts_of(experiment, rows, task.config.prompt) for rows in task.stores]


def _texts_of(experiment: Experiment, rows: Store, prompt: str | None) -> Store:
    """All texts of some rows in their order, both of a pair, as queries that bring their prompt."""
    per_part = experiment.encode.queries_per_unit
    folder = Path(experiment.cache()) / f"task-texts-{fingerprint([VERSION, rows.fingerprint, prompt, per_part])}"
    if not (folder / "store.json").exists():
        writer, number = StoreWriter(folder, QUERIES, per_part), 0
        for part in rows.iter_parts(["query", "pos", "prompt"]):
            for row in part.to_pylist():
                for text in (row["query"], *row["pos"]):
                    writer.add({"id": str(number), "text": text, "prompt": row["prompt"] or prompt})
                    number += 1
        writer.finish()
    return Store.open(folder)


Judged = tuple[dict[str, float], tuple[float, float] | None]
"""A value a model, and the interval of the difference. None: there is one model alone, or no interval is known."""


def _judge_sts(task: Task, vectors: Mapping[str, list[Vectors]], seed: int, num_resamples: int) -> Judged:
    scores = _scores(task.test)
    found = {name: cosines(test[::2], test[1::2]) for name, (test,) in vectors.items()}
    values = {name: spearman(own, scores) for name, own in found.items()}
    if "tuned" not in found:
        return values, None
    return values, spearman_interval(found["base"], found["tuned"], scores, seed=seed)


def _judge_classification(task: Task, vectors: Mapping[str, list[Vectors]], seed: int, num_resamples: int) -> Judged:
    assert task.train is not None
    learned, asked = _labels(task.train), _labels(task.test)
    classifier = task.config.classifier or "logistic_regression"
    right = {
        name: right_answers((train, learned), (test, asked), classifier=classifier).astype(np.float64)
        for name, (test, train) in vectors.items()
    }
    values = {name: float(own.mean()) for name, own in right.items()}
    if "tuned" not in right:
        return values, None
    return values, bootstrap_interval(right["tuned"] - right["base"], num_resamples=num_resamples, seed=seed)


def _judge_clustering(task: Task, vectors: Mapping[str, list[Vectors]], seed: int, num_resamples: int) -> Judged:
    labels = _labels(task.test)
    return {name: v_measure(test, labels, seed=seed) for name, (test,) in vectors.items()}, None


JUDGES = {"sts": _judge_sts, "classification": _judge_classification, "clustering": _judge_clustering}


def _scores(rows: Store) -> NDArray[np.float64]:
    found = [score for part in rows.iter_parts(["pos_scores"]) for (score,) in part.column("pos_scores").to_pylist()]
    return np.array(found, np.float64)


def _labels(rows: Store) -> list[str]:
    return [str(label) for part in rows.iter_parts(["label"]) for label in part.column("label").to_pylist()]
