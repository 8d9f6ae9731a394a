"""What is to be known of tasks before their figures are believed: texts that are cut, prompts, texts seen before."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.compute as pc

from rayembed.config import Experiment
from rayembed.config.wording import counted
from rayembed.data.prompts import query_text
from rayembed.data.store import Store, hash_texts
from rayembed.data.tasks import CLASS, STS
from rayembed.jobs.evaluate_tasks import Task, asked_of_tasks, task_length, task_texts
from rayembed.models.in_context import reader_of
from rayembed.models.loading import tokenizer_of

SAMPLE = 2000  # texts of a task whose tokens are counted


def task_notes(experiment: Experiment, tasks: Sequence[Task], rows: Store | None = None) -> list[str]:
    """Lines about each task.

    Args:
        experiment: lengths, model; its section train says whether the rows are trained on.
        tasks: with rows that have no errors.
        rows: of data.train. None: they are not compared with the tasks.
    """
    lines = []
    for task in tasks:
        lines.append(_lengths(experiment, task))
        if task.train is not None:
            lines += _seen(task, task.train, "its train rows")
        if rows is not None and experiment.train is not None:
            lines += _seen(task, rows, "the rows of data.train")
            lines += _prompts(task, rows)
    return lines


def row_type(task: Task) -> str:
    """The type of the task's rows, and of training rows of its kind."""
    return STS if task.config.kind == "sts" else CLASS


def _lengths(experiment: Experiment, task: Task) -> str:
    """How long the texts are, and the share that is cut."""
    asked, limit = asked_of_tasks(experiment), task_length(experiment, task)
    tokenizer = tokenizer_of(asked.model)
    reader = reader_of(asked, tokenizer)
    texts = []
    for store in task_texts(experiment, task):
        chosen = np.random.default_rng(0).choice(store.num_rows, min(SAMPLE, store.num_rows), replace=False)
        found = store.take(np.sort(chosen), ["text", "prompt"]).to_pylist()
        texts += [query_text(asked.model, row["text"], row["prompt"]) for row in found]
    if reader is not None:
        texts = [text + reader.suffix for text in texts]
    lengths = np.array([len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
    setting = "its max_len" if task.config.max_len is not None else "the longer length of queries and passages"
    return (
        f"task {task.config.name}: {lengths.mean():.0f} tokens a text on average, "
        f"{100 * float((lengths > limit).mean()):.1f} % longer than {limit} ({setting}) are cut (of {len(texts):,} "
        "sampled)"
    )


def _seen(task: Task, others: Store, whose: str) -> list[str]:
    """How many test rows are among others."""
    known = np.unique(hash_texts(_keys(others, row_type(task))))
    asked = hash_texts(_keys(task.test, row_type(task)))
    number = int(np.isin(asked, known).sum())
    if not number:
        return []
    what = "pairs" if row_type(task) == STS else "texts"
    return [
        f"warning: task {task.config.name}: {number:,} of its {len(asked):,} test {what} are among {whose} too; its "
        "figures say less of new ones"
    ]


def _keys(rows: Store, kind: str) -> Iterator[str]:
    """What tells the rows of a type apart: the text, or the pair in either order."""
    for part in rows.iter_parts(["query", "pos", "type"]):
        own = part.filter(pc.equal(part.column("type"), kind)).select(["query", "pos"])
        for row in own.to_pylist():
            yield "\0".join(sorted([row["query"], *row["pos"]]))


def _prompts(task: Task, rows: Store) -> list[str]:
    """Whether the task puts what no training row of its kind puts."""
    trained = _put(rows, row_type(task), None)
    asked = _put(task.test, row_type(task), task.config.prompt)
    if not trained or asked <= trained:
        return []
    return [
        f"warning: task {task.config.name} puts {_shown(asked)} before its texts, and the training rows of type "
        f"{row_type(task)} have {_shown(trained)}; set its prompt, or that of the rows (prompt in data.datasets), so "
        "that texts are judged as they were trained"
    ]


def _put(rows: Store, kind: str, prompt: str | None) -> set[str]:
    """The prompts of the rows of a type; empty: none."""
    found = set[str]()
    for part in rows.iter_parts(["prompt", "type"]):
        own = part.filter(pc.equal(part.column("type"), kind)).column("prompt")
        found |= {value or prompt or "" for value in pc.unique(own).to_pylist()}
    return found


def _shown(prompts: set[str]) -> str:
    shown = [repr(prompt) if prompt else "no prompt" for prompt in sorted(prompts)]
    return ", ".join(shown[:3]) + (f" and {counted(len(shown) - 3, 'other')}" if len(shown) > 3 else "")
