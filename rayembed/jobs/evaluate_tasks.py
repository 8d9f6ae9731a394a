"""Tasks beside retrieval: reads their rows, encodes the texts of all of them in one pass a model, and judges both."""

from collections.abc import Callable, Mapping, Sequence
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
from rayembed.jobs.vector_files import Vectors
from rayembed.jobs.vectors import Wanted, encode_stores
from rayembed.models.loading import check_length, load_config

VERSION = 1  # raise it when the same rows give other texts
METRICS = {"sts": "spearman", "classification": "accuracy", "clustering": "v_measure"}
PAIRS = 8192  # whose vectors are in memory at a time
Values = NDArray[np.float64]


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

    @property
    def num_judged(self) -> int:
        """Texts that the figure is of; both of a pair."""
        return (2 if self.config.kind == "sts" else 1) * self.test.num_rows


def read_tasks(experiment: Experiment, report: Report) -> list[Task]:
    """The tasks of section evaluate with their rows.

    Args:
        experiment: section evaluate; none has no tasks.
        report: takes what is wrong, by file and line; no task is to be used if it has errors.

    Raises:
        ValueError: the model reads fewer tokens than the max_len of a task.
    """
    tasks, own, model = [], Report(), experiment.model
    for config in (experiment.evaluate or EvaluateConfig()).tasks:
        if config.max_len is not None:
            setting = f"max_len of task {config.name!r}"
            check_length(model.name_or_path, config.max_len, setting, trust_remote_code=model.trust_remote_code)
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
        if task.train is not None and task.train.fingerprint == task.test.fingerprint:
            raise ValueError(
                "its train rows are its test rows; give evaluate.tasks rows that the classifier has not seen"
            )
    except ValueError as error:
        files = ", ".join(map(public_name, task.config.test))
        report.error("task without a metric", Problem(files, None, f"task {task.config.name!r}", str(error)))


def tasks_reads(experiment: Experiment, tasks: Sequence[Task]) -> Reads:
    """What the figures depend on beside model and seed, for the record of the job: contents, not paths."""
    return {
        task.config.name: {
            "kind": task.config.kind,
            "classifier": task.config.classifier,
            "prompt": task.config.prompt,
            "max_len": task_length(experiment, task),
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
    asked = asked_of_tasks(experiment)
    wanted = {
        (store.folder, task_length(experiment, task)): store for task in tasks for store in task_texts(experiment, task)
    }
    sides = [Wanted(store, "query", length) for (_, length), store in wanted.items()]
    found: dict[str, dict[str, Values]] = {task.config.name: {} for task in tasks}
    for name, model in models.items():  # one model at a time: its vectors are on disk, and of one task in memory
        vectors = dict(zip(wanted, encode_stores(asked, sides, model=model), strict=True))
        for task in tasks:
            length = task_length(experiment, task)
            own = [vectors[store.folder, length] for store in task_texts(experiment, task)]
            found[task.config.name][name] = JUDGES[task.config.kind](task, own, experiment.seed)
    return {task.config.name: _figures(experiment, task, found[task.config.name], num_resamples) for task in tasks}


def _figures(experiment: Experiment, task: Task, found: Mapping[str, Values], num_resamples: int) -> dict[str, Any]:
    """What metrics.json says of a task, from what its judge says of each model."""
    kind, seed = task.config.kind, experiment.seed
    figures: dict[str, Any] = {"kind": kind, "metric": METRICS[kind]}
    scores = _scores(task.test) if kind == "sts" else None
    for name, values in found.items():
        figures[name] = float(values.mean()) if scores is None else spearman(values, scores)
    if "tuned" in found and kind != "clustering":
        base, tuned = found["base"], found["tuned"]
        interval = (
            bootstrap_interval(tuned - base, num_resamples=num_resamples, seed=seed)
            if scores is None
            else spearman_interval(base, tuned, scores, seed=seed)
        )
        figures["ci95"] = list(interval)
    return {**figures, "num_texts": task.num_judged}


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


def asked_of_tasks(experiment: Experiment) -> Experiment:
    """The experiment without what it puts before queries of retrieval: instruction, and examples of family icl.

    In training, texts of types sts and class are put so too: see data.prompts.query_of_row.
    """
    icl = experiment.icl and replace(experiment.icl, examples_for_task=[])
    return replace(experiment, icl=icl, model=replace(experiment.model, query_instruction_for_retrieval=None))


def task_length(experiment: Experiment, task: Task) -> int:
    """Tokens kept of the task's texts."""
    return task.config.max_len or max(experiment.max_len("query"), experiment.max_len("passage"))


def task_texts(experiment: Experiment, task: Task) -> list[Store]:
    """A store of queries for each of the task's stores of rows."""
    return [_texts_of(experiment, rows, task.config.prompt) for rows in task.stores]


def memory(experiment: Experiment, tasks: Sequence[Task]) -> int:
    """Bytes that judging holds at most: of one task and one model, the vectors as they are and as directions."""
    model = experiment.model
    width = int(load_config(model.name_or_path, trust_remote_code=model.trust_remote_code).hidden_size)
    numbers = [  # float32; cosines are taken in float64
        min(task.num_texts, 2 * PAIRS) * (4 + 8) if task.config.kind == "sts" else task.num_texts * (4 + 4)
        for task in tasks
    ]
    return width * max(numbers)


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


def _judge_sts(task: Task, vectors: list[Vectors], seed: int) -> Values:
    """Cosines [N] of the pairs."""
    (test,) = vectors
    found = []
    for first in range(0, test.store.num_rows, 2 * PAIRS):  # texts, of which pairs are neighbours
        both = test.rows(first, min(first + 2 * PAIRS, test.store.num_rows))
        found.append(cosines(both[::2], both[1::2]))
    return np.concatenate(found)


def _judge_classification(task: Task, vectors: list[Vectors], seed: int) -> Values:
    """1 [N] where the classifier is right, else 0."""
    assert task.train is not None
    test, train = vectors
    return right_answers(
        (train.all(), _labels(task.train)),
        (test.all(), _labels(task.test)),
        classifier=task.config.classifier or "logistic_regression",
    ).astype(np.float64)


def _judge_clustering(task: Task, vectors: list[Vectors], seed: int) -> Values:
    """The v-measure [1]."""
    (test,) = vectors
    return np.array([v_measure(test.all(), _labels(task.test), seed=seed)])


JUDGES: dict[str, Callable[[Task, list[Vectors], int], Values]] = {
    "sts": _judge_sts,
    "classification": _judge_classification,
    "clustering": _judge_clustering,
}


def _scores(rows: Store) -> Values:
    found = [score for part in rows.iter_parts(["pos_scores"]) for (score,) in part.column("pos_scores").to_pylist()]
    return np.array(found, np.float64)


def _labels(rows: Store) -> list[str]:
    return [str(label) for part in rows.iter_parts(["label"]) for label in part.column("label").to_pylist()]
