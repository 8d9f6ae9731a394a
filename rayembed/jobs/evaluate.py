"""The job `evaluate`: base and tuned model on the corpus of an evaluation set, and on tasks beside retrieval."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig
from rayembed.config.wording import counted
from rayembed.data.mirror import folder_here
from rayembed.data.prepare import Evaluation, prepare
from rayembed.data.storage import fingerprint, write_atomic
from rayembed.jobs import estimates
from rayembed.jobs.check_tasks import task_notes
from rayembed.jobs.evaluate_retrieval import evaluate_retrieval
from rayembed.jobs.evaluate_tasks import Task, evaluate_tasks, memory, read_tasks, task_lines, tasks_reads
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.inputs import NotYetError
from rayembed.jobs.rerank import base_of, check_rerankers, check_retriever, retriever
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.session import ray_session
from rayembed.jobs.vectors import encoding_reads
from rayembed.models.pairs import trained_reading

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judging:
    """What the models are judged on; at least one of the two."""

    retrieval: Evaluation | None
    tasks: list[Task]


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Evaluates the base model and, where OUTPUT_DIR/model is there, the tuned one.

    Args:
        experiment: sections evaluate, data, model. Without data.evaluation the tasks alone are judged.
        overwrite: replace a folder that was evaluated from something else.

    Returns:
        OUTPUT_DIR/evaluate: metrics.json, and of retrieval similarities.json, per_query.jsonl, base.trec, tuned.trec.
    """
    config, data = _section(experiment), _data(experiment)
    final = Path(experiment.output_dir) / "evaluate"

    def write(folder: Path) -> None:
        for line in task_notes(experiment, data.tasks):
            logger.info("evaluate: %s", line)
        models, metrics = _models(experiment), dict[str, Any]()
        with ray_session(experiment):
            if data.retrieval is not None:
                metrics = evaluate_retrieval(experiment, config, data.retrieval, models, folder)
            if data.tasks:
                metrics["tasks"] = evaluate_tasks(experiment, data.tasks, models, num_resamples=config.num_permutations)
        write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1).encode())

    reads = _reads(experiment, config, data)
    written = written_once(final, reads, write, overwrite=overwrite, experiment=experiment)
    metrics = json.loads((written / "metrics.json").read_text())
    for line in [*_retrieval_lines(metrics), *head_lines(metrics), *task_lines(metrics)]:
        logger.info("evaluate: %s", line)
    return written


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    config, data = _section(experiment), _data(experiment)
    if experiment.train is not None and not (Path(experiment.output_dir) / "model").is_dir():
        names, where = "base and (after train) tuned", "would be written"
        if experiment.trains_reranker():
            check_retriever(experiment)
    else:
        names = " and ".join(_models(experiment))
        where = state(Path(experiment.output_dir) / "evaluate", _reads(experiment, config, data), overwrite=overwrite)
    asked = []
    if data.retrieval is not None:
        queries, corpus = data.retrieval.queries, data.retrieval.corpus
        cost = estimates.encoding(experiment, queries, "text", corpus)
        asked.append(
            f"{counted(queries.num_rows, 'query')} against {counted(corpus.num_rows, 'passage')} ({cost} a model)"
        )
    asked += [
        f"task {task.config.name} ({task.config.kind}, {counted(task.num_texts, 'text')} to encode)"
        for task in data.tasks
    ]
    if experiment.trains_reranker():
        names += f" (the ranking of {config.retriever}, and its {config.rerank_top_k} best a query brought into order)"
    held = f" (judging tasks holds up to {memory(experiment, data.tasks) / 1e6:,.1f} MB at once)" if data.tasks else ""
    return f"evaluate: {', '.join(asked)}; {names}{held}; {where}"


def summary(folder: Path) -> str:
    """The result in one line: of retrieval, or where none was judged of the tasks."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return "; ".join(_retrieval_lines(metrics) or task_lines(metrics))


def _retrieval_lines(metrics: dict[str, Any]) -> list[str]:
    """One line, or none where there was no retrieval."""
    if "base" not in metrics:
        return []
    found = metrics.get("significance")
    if found is None:
        name = metrics["metric"]
        return [f"base {name} {metrics['base'][name]:.4f} (no tuned model yet)"]
    of = f" ({metrics['base_is']})" if "base_is" in metrics else ""
    return [
        f"{found['metric']} {found['base']:.4f}{of} -> {found['tuned']:.4f} ({found['difference']:+.4f}, "
        f"p = {found['p_value']:.4g}; won {found['wins']}, tied {found['ties']}, lost {found['losses']} of "
        f"{counted(found['num_queries'], 'query')})"
    ]


def head_lines(metrics: dict[str, Any]) -> list[str]:
    """What each of BGE-M3's representations is worth, a line a model."""
    return [
        f"{model}, {metrics['metric']} by "
        + ", ".join(f"{head} {means[metrics['metric']]:.4f}" for head, means in heads.items())
        for model, heads in metrics.get("heads", {}).items()
    ]


def _section(experiment: Experiment) -> EvaluateConfig:
    return experiment.evaluate or EvaluateConfig()


def _data(experiment: Experiment) -> Judging:
    prepared = prepare(experiment, rows=False, corpus=False)
    tasks = read_tasks(experiment, prepared.report)
    prepared.report.raise_if_errors()
    if prepared.evaluation is None and not tasks:
        raise ValueError("evaluate has nothing to judge by; set data.evaluation to a BEIR folder, or evaluate.tasks")
    return Judging(prepared.evaluation, tasks)


def _models(experiment: Experiment) -> dict[str, str]:
    tuned = Path(experiment.output_dir) / "model"
    models = {"base": base_of(experiment) if experiment.trains_reranker() else experiment.model.name_or_path}
    if tuned.is_dir():
        models["tuned"] = str(folder_here(tuned))
    elif experiment.train is not None:
        raise NotYetError(
            f"{tuned} is not there, and the experiment has a section train; run `rayembed train` first (or "
            "`rayembed run`), or remove the section to evaluate the base model alone"
        )
    return models


def _reads(experiment: Experiment, config: EvaluateConfig, data: Judging) -> Reads:
    models = _models(experiment)
    encoding = encoding_reads(experiment, *models.values())
    settings = asdict(config)
    settings.pop("tasks")  # by their contents, below: files may move
    return {
        **encoding,
        "weights": dict(zip(models, encoding["weights"], strict=True)),
        **(_reads_of_reranker(experiment, models.values()) if experiment.trains_reranker() else {}),
        **({"m3": asdict(m3)} if (m3 := experiment.family_sections().get("m3")) is not None else {}),
        **({} if data.retrieval is None else _reads_of_retrieval(data.retrieval)),
        **({"tasks": tasks_reads(experiment, data.tasks)} if data.tasks else {}),
        "evaluate": settings,
        "seed": experiment.seed,
    }


def _reads_of_retrieval(evaluation: Evaluation) -> Reads:
    return {
        "queries": evaluation.queries.fingerprint,
        "corpus": evaluation.corpus.fingerprint,
        "qrels": fingerprint(evaluation.qrels),
    }


def _reads_of_reranker(experiment: Experiment, models: Iterable[str]) -> Reads:
    check_retriever(experiment)
    check_rerankers(experiment, models)  # before the retriever encodes the corpus for them
    found = retriever(experiment)
    return {
        "reranker": asdict(trained_reading(experiment)),
        "retriever": encoding_reads(found, found.model.name_or_path),
    }
