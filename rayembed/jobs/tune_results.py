"""What a sweep found: a table (log, parquet), the best values as an experiment file, figures for the report."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayembed.config import Experiment
from rayembed.config.loading import dump, with_values
from rayembed.config.space import Point
from rayembed.config.trials import in_words, section_of
from rayembed.config.uris import split_options, without_keys_within
from rayembed.config.wording import counted
from rayembed.data.copies import shown, uri_of
from rayembed.data.mirror import is_there
from rayembed.data.storage import holds, whole_file, write_atomic, write_changed
from rayembed.jobs.run_folder import as_asked
from rayembed.jobs.tune_trials import Trial
from rayembed.tracking.progress import duration

TABLE, BEST, FIGURES = "results.parquet", "best.yaml", "sweep.json"
Row = dict[str, Any]


class NothingFoundError(RuntimeError):
    """No trial of a sweep has a figure."""


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that have ended, the best figure first, those without one last; of equal ones the earlier first."""
    ended = [trial for trial in trials if trial.result is not None]
    return sorted(
        ended, key=lambda own: (-figure if (figure := _figure(own)) is not None else float("inf"), own.number)
    )


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the best figure; one that failed after it was evaluated is none.

    Raises:
        NothingFoundError: there is none; says why the first of them failed.
    """
    found = [trial for trial in ranked(trials) if _figure(trial) is not None and _status(trial) != "failed"]
    if found:
        return found[0]
    failed = [trial.result.failure.error for trial in trials if trial.result and trial.result.failure]
    why = f"; trial {trials[0].number} says: {failed[0]}" if failed else ""
    raise NothingFoundError(f"none of {counted(len(trials), 'trial')} has a figure{why}")


def base_figure(trials: Sequence[Trial]) -> float | None:
    """Of the model before training, as the first trial found it that has one."""
    found = (dict(trial.result.evaluations).get(0) for trial in trials if trial.result is not None)
    return next((figure for figure in found if figure is not None), None)


def best_experiment(experiment: Experiment, values: Point) -> Experiment:
    """The experiment with the best values in place of the sweep, in the same run folder."""
    return with_values(experiment, {**values, "tune": None}, where=f"the best trial ({in_words(values)})")


def write_results(experiment: Experiment, folder: Path, trials: Sequence[Trial]) -> None:
    """Writes what is known so far.

    Args:
        experiment: with a section tune.
        folder: of the sweep.
        trials: all that were begun.
    """
    config, ended = section_of(experiment), [trial for trial in trials if trial.result is not None]
    rows: Any = without_keys_within([_row(trial, list(config.space), config.metric) for trial in ended])
    if not rows:
        return
    curves = [trial.result.evaluations for trial in ended if trial.result is not None]
    told = {
        "metric": config.metric,
        "keys": list(config.space),
        "base": base_figure(trials),
        "trials": [{**row, "evaluations": curve} for row, curve in zip(rows, curves, strict=True)],
    }
    figures = json.dumps(told).encode()
    if not (holds(folder / FIGURES, figures) and is_there(folder / TABLE)):  # the table is written before them
        with whole_file(folder / TABLE) as working:
            pq.write_table(_table(rows), working)
        write_atomic(folder / FIGURES, figures)
    try:
        best = best_of(trials)
    except NothingFoundError:
        return
    asked = as_asked(experiment)
    out, options = split_options(asked.output_dir)
    ready = best_experiment(asked, best.changed)
    ready = replace(ready, output_dir=f"{out}-best{options}", cache_dir=uri_of(experiment.cache()))
    head = f"# Trial {best.number} of {shown(folder)}: {config.metric} {_figure(best):.4f} on the dev split.\n"
    write_changed(folder / BEST, (head + dump(ready)).encode())


def table_in_words(experiment: Experiment, trials: Sequence[Trial]) -> list[str]:
    """Lines of the table, the best trial first and the base model where it belongs."""
    config = section_of(experiment)
    keys, base = list(config.space), base_figure(trials)
    header = ["trial", *keys, config.metric, "at step", "steps", "time", ""]
    lines = [(_figure(trial), _cells(trial, keys)) for trial in ranked(trials)]
    if base is not None:
        own = ["base", *[""] * len(keys), f"{base:.4f}", "0", "", "", "the model before training"]
        worse = (place for place, (figure, _) in enumerate(lines) if figure is None or figure < base)
        lines.insert(next(worse, len(lines)), (base, own))
    cells = [header, *(own for _, own in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header) - 1)]
    return [
        "  ".join([*(text.rjust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in cells
    ]


def _cells(trial: Trial, keys: Sequence[str]) -> list[str]:
    result = trial.result
    assert result is not None
    best = result.best
    values = [_shown(trial.values[key]) if key in trial.values else "" for key in keys]
    figures = ["", ""] if best is None else [f"{best[1]:.4f}", str(best[0])]
    steps = result.evaluations[-1][0] if result.evaluations else 0
    notes = [str(result.status)] if result.status != "done" else []
    notes += ["the experiment as it is"] if trial.baseline else []
    notes += [result.failure.error.splitlines()[0]] if result.failure is not None else []
    return [str(trial.number), *values, *figures, str(steps), duration(result.seconds), "; ".join(notes)]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _row(trial: Trial, keys: Sequence[str], metric: str) -> Row:
    result = trial.result
    assert result is not None
    step, figure = result.best or (None, None)
    return {
        "number": trial.number,
        "name": trial.name,
        **{key: trial.values.get(key) for key in keys},
        metric: figure,
        "step": step,
        "steps": result.evaluations[-1][0] if result.evaluations else 0,
        "seconds": result.seconds,
        "status": result.status,
        "baseline": trial.baseline,
        "error": "" if result.failure is None else result.failure.error,
    }


def _table(rows: Sequence[Row]) -> pa.Table:
    """One column a key; values that parquet has no common type for are JSON texts."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.table(columns)


def _figure(trial: Trial) -> float | None:
    best = trial.result.best if trial.result is not None else None
    return None if best is None else best[1]


def _status(trial: Trial) -> str:
    return "" if trial.result is None else trial.result.status
