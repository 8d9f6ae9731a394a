"""`rayembed.tune`: a sweep from a script."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rayembed.config import Experiment
from rayembed.config.loading import load, with_values
from rayembed.config.tune import TuneConfig
from rayembed.data.mirror import here
from rayembed.jobs import tune as job
from rayembed.jobs.tune_results import BEST, TABLE, base_figure, best_of, ranked
from rayembed.jobs.tune_trials import Trial, known_trials


@dataclass(frozen=True)
class Sweep:
    """What a sweep found."""

    metric: str
    best: dict[str, Any]
    """Values of the best trial, by dotted keys."""

    figure: float
    """Of the best trial: its best evaluation on the dev split."""

    baseline_figure: float | None
    """Of the experiment as it is. None: it was not a trial."""

    base_figure: float | None
    """Of the model before training. None: it was not evaluated."""

    trials: tuple[Trial, ...]
    """The best first."""

    folder: Path
    """OUTPUT_DIR/tune: results.parquet, best.yaml, trials/; of an object store, this machine's copy."""

    best_experiment: Path
    """The experiment file with the best values."""


def tune(
    experiment: str | Path | Experiment,
    space: Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    search: Literal["random", "grid", "optuna"] | None = None,
    num_samples: int | None = None,
    metric: str | None = None,
    scheduler: Literal["none", "asha"] | None = None,
    then: Literal["train"] | None = None,
    **settings: Any,  # noqa: ANN401 - others of section tune
) -> Sweep:
    """Tries other values of settings, as `rayembed tune` does; called again, it goes on where it was left.

    Args:
        experiment: a file, or one that `rayembed.config.loading.load` gave.
        space: dotted keys, and what each may be: {"train.temperature": {"loguniform": [0.01, 0.1]}}. None: as the
            experiment's section tune says.
        overrides: "section.key=value" each, over the file.
        overwrite: begin anew what was made with another space or experiment.
        search: None, as of all that follow: as the experiment says.
        num_samples: trials in all.
        metric: what they are compared by.
        scheduler: asha stops what does badly.
        then: train goes on with the best values in OUTPUT_DIR.
        settings: others of section tune, see `rayembed tune --help`.

    Raises:
        ValueError: the space, or the experiment at some point of it, is refused.
        RuntimeError: no trial has a figure.
    """
    if not isinstance(experiment, Experiment):
        experiment = load(os.fspath(experiment), overrides)
    elif overrides:
        raise ValueError("overrides are of a file; of an experiment that is loaded, use dataclasses.replace")
    given: dict[str, Any] = {"space": space and dict(space), "search": search, "num_samples": num_samples}
    given |= {"metric": metric, "scheduler": scheduler, "then": then, **settings}
    own = asdict(experiment.tune or TuneConfig()) | {key: value for key, value in given.items() if value is not None}
    asked = with_values(replace(experiment, tune=None), {"tune": own}, where="rayembed.tune")
    folder = job.run(asked, overwrite=overwrite)
    trials = known_trials(folder)
    here(folder / TABLE)
    best = best_of(trials)
    figures = {trial.name: trial.result.best for trial in trials if trial.result is not None}
    as_it_is = next((figures.get(trial.name) for trial in trials if trial.baseline), None)
    found = figures[best.name]
    assert found is not None
    return Sweep(
        metric=own["metric"],
        best=best.values,
        figure=found[1],
        baseline_figure=None if as_it_is is None else as_it_is[1],
        base_figure=base_figure(trials),
        trials=tuple(ranked(trials)),
        folder=folder,
        best_experiment=folder / BEST,
    )
