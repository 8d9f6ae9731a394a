"""Reads what the jobs left in a run folder; a file that is not there is a sentence, a file that is broken an error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# What the page reads -> the job that writes it.
JOB_OF = {
    "config.yaml": "run",
    "mine/stats.json": "mine",
    "score/stats.json": "score",
    "train/metrics.jsonl": "train",
    "evaluate/metrics.json": "evaluate",
    "evaluate/similarities.json": "evaluate",
    "evaluate/per_query.jsonl": "evaluate",
}


def absence(name: str) -> str:
    """The sentence that stands where the content of file `name` (a key of JOB_OF) would be."""
    return f"There is no {name} in the run folder yet: the job `rayembed {JOB_OF[name]} EXPERIMENT.yaml` writes it."


def read_text(run_folder: Path, name: str) -> str | None:
    """Text of a file; None if it is not there."""
    path = run_folder / name
    return path.read_text(encoding="utf-8") if path.exists() else None


def read_json(run_folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object of a file; None if it is not there.

    Raises:
        ValueError: the file holds something else; says which job writes it anew.
    """
    text = read_text(run_folder, name)
    return None if text is None else _parse(text, run_folder / name, str(run_folder / name))


def read_settings(run_folder: Path, name: str) -> dict[str, Any]:
    """The sections of a YAML file; none if it is not there.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = yaml.safe_load(read_text(run_folder, name) or "{}")
    except yaml.YAMLError as error:
        raise ValueError(f"{run_folder / name} is not YAML ({error}); delete it and run the job again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{run_folder / name} holds {type(found).__name__}, not settings; delete it and run again")
    return found


def read_rows(run_folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line, without holding the file in memory; none if the file is not there.

    Raises:
        ValueError: a line holds something else; names file and line.
    """
    path = run_folder / name
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, path, f"{path}:{number}")


def _parse(text: str, path: Path, place: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); delete {path.parent} and run the job again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} holds {type(found).__name__}, not a JSON object; delete {path.parent} and run again")
    return found
