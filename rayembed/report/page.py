"""report.html: one self-contained page about a run, from whatever its jobs have written so far."""

import os
from pathlib import Path
from typing import Any

from rayembed.report import evaluation, reading, wording
from rayembed.report.rendering import counts_tables, render
from rayembed.report.rounds import rounds_section
from rayembed.report.sweep import sweep_section
from rayembed.report.training import training_section

HARVEST_FILE = "harvest.json"  # in harvest.output, a folder of the user's

OF_RETRIEVAL = ("evaluate/similarities.json", "evaluate/per_query.jsonl")


def build_report(run_folder: Path, title: str, *, harvest: str | None = None) -> Path:
    """Write `report.html` into a run folder, atomically, and return its path.

    A file that no job has written yet is a sentence that names the job. The page loads nothing and runs no script.

    Args:
        run_folder: the folder of the run, an experiment's output_dir.
        title: of the page.
        harvest: folder of the data set that was built. None: as config.yaml says.

    Raises:
        ValueError: the folder is not there, or a file in it is broken; names the file.
    """
    if not run_folder.is_dir():
        raise ValueError(f"there is no run folder {run_folder}; set output_dir to a folder that a job has written")
    page = render("report.html.j2", {"title": title} | _content(run_folder, harvest))
    path = run_folder / "report.html"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _content(run_folder: Path, harvest: str | None) -> dict[str, Any]:
    """What the template shows; a section is None, and `absent` has its sentence, where its file is not there."""
    settings = reading.read_text(run_folder, "config.yaml")
    metrics = reading.read_json(run_folder, "evaluate/metrics.json")
    similarities = reading.read_json(run_folder, "evaluate/similarities.json")
    test = (metrics or {}).get("significance")
    return {
        "absent": {name: _absence(name, metrics) for name in reading.JOB_OF},
        "headline": evaluation.headline(metrics),
        "metrics": metrics and evaluation.metric_rows(metrics),
        "tasks": evaluation.task_rows(metrics or {}),
        "heads": evaluation.head_rows(metrics or {}),
        "head_metric": wording.metric_label((metrics or {}).get("metric", "")),
        "metrics_facts": evaluation.other_facts(metrics) if metrics else [],
        "metric_tested": wording.metric_label(test["metric"]) if test else "value",
        "test_facts": evaluation.test_facts(test) if test else [],
        "training": training_section(
            reading.read_rows(run_folder, "train/metrics.jsonl"),
            reading.read_rows(run_folder, "train/evaluations.jsonl"),
        ),
        "similarity_figures": similarities and evaluation.similarity_figures(similarities),
        "similarity_rows": similarities and evaluation.similarity_rows(similarities),
        "examples": evaluation.examples(lambda: reading.read_rows(run_folder, "evaluate/per_query.jsonl")),
        "rounds": rounds_section(run_folder),
        "sweep": sweep_section(run_folder),
        "harvest": counts_tables(_harvest(run_folder, harvest)),
        "mine": counts_tables(reading.read_json(run_folder, "mine/stats.json")),
        "score": counts_tables(reading.read_json(run_folder, "score/stats.json")),
        "settings": settings,
    }


def _absence(name: str, metrics: dict[str, Any] | None) -> str:
    """Why a file is not there; with tasks alone no job will write those of retrieval."""
    if metrics and "base" not in metrics and name in OF_RETRIEVAL:
        return f"There is no {name}: this run judges tasks alone; set data.evaluation for retrieval."
    return reading.absence(name)


def _harvest(run_folder: Path, folder: str | None) -> dict[str, Any] | None:
    """Counts of the harvest whose folder the settings name; None if they name none, or it is not there (any more)."""
    section = reading.read_settings(run_folder, "config.yaml").get("harvest")
    counts = reading.read_json(Path(folder or section["output"]), HARVEST_FILE) if section else None
    return {key: value for key, value in counts.items() if key != "fingerprint"} if counts else None
