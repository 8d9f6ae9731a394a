"""What a trial is before it starts: its experiment, its rows, when it is evaluated.

All of it is done by the process that runs the sweep, one trial after the other: what trials share is then made once,
and two of them never write the same file of the cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rayembed.config import Experiment
from rayembed.config.loading import ConfigError
from rayembed.config.space import Dimension, Point
from rayembed.config.trials import in_words, points_to_check, section_of, with_point
from rayembed.data.datasets import read_datasets
from rayembed.data.plan import total_batches
from rayembed.data.store import Store
from rayembed.jobs import mine, score
from rayembed.jobs.dev_split import DevSplit, dev_split
from rayembed.jobs.folders import changes, state
from rayembed.jobs.inputs import check_rows, coming_rows, planned_batches, training_rows
from rayembed.jobs.tokenize import tokenize_rows
from rayembed.jobs.train import check_model
from rayembed.jobs.tune_trials import Trial, trial_folder

EVALUATIONS = 8  # of a trial, where train.eval_steps does not say when
MOST_COMPARED = 32  # points whose mined rows are compared with the experiment's own before the sweep starts


@dataclass(frozen=True)
class Prepared:
    """A trial that can start."""

    trial: Trial
    rows: Path
    """Folder of the store of its training rows."""

    eval_steps: int
    steps: int

    @property
    def evaluations(self) -> int:
        """Evaluations of a trial that is not stopped."""
        return math.ceil(self.steps / self.eval_steps)


def trial_experiment(experiment: Experiment, tune_folder: Path, trial: Trial, *, eval_steps: int) -> Experiment:
    """The experiment of a trial, in a run folder of its own, with the cache of all.

    Raises:
        ConfigError: a value of the trial is refused.
    """
    own, metric = with_point(experiment, trial.changed), section_of(experiment).metric
    assert own.train is not None
    train = replace(own.train, eval_steps=eval_steps, metric_for_best_model=metric)
    folder = str(trial_folder(tune_folder, trial.name))
    others = dict.fromkeys(("harvest", "evaluate", "export", "split", "merge"))
    return replace(own, output_dir=folder, cache_dir=experiment.cache(), train=train, **others)  # type: ignore[arg-type]


def compared_on(experiment: Experiment) -> DevSplit:
    """The dev split that the experiment as it is, trial 0, is evaluated on.

    Raises:
        ValueError: as of dev_split.
    """
    as_it_is = Trial(0, {}, baseline=True)
    found = dev_split(trial_experiment(experiment, Path(experiment.output_dir), as_it_is, eval_steps=1))
    assert found is not None
    return found


def prepare_shared(experiment: Experiment, *, overwrite: bool = False) -> None:
    """Mines and scores once, in OUTPUT_DIR, what no dimension of the sweep changes.

    Args:
        experiment: with a section tune.
        overwrite: replace what was made from something else.
    """
    others = list(_other_inputs(section_of(experiment).dimensions(), experiment))
    if experiment.mine is not None:
        if not all(_mines_alike(experiment, other) for other in others):
            return
        mine.run(experiment, overwrite=overwrite)
    if experiment.score is not None and all(_scores_alike(experiment, other) for other in others):
        score.run(experiment, overwrite=overwrite)


def check_shared(experiment: Experiment) -> None:
    """Refuses folders that `prepare_shared` would refuse, as far as their rows are there already.

    Raises:
        ChangedError: one was made from something else.
    """
    out, others = Path(experiment.output_dir), list(_other_inputs(section_of(experiment).dimensions(), experiment))
    if experiment.mine is not None:
        if not all(_mines_alike(experiment, other) for other in others):
            return
        state(out / "mine", mine.reads(experiment), overwrite=False)
    to_come = coming_rows(experiment, after=("mine",))
    if experiment.score is not None and not to_come and all(_scores_alike(experiment, other) for other in others):
        rows, _ = training_rows(replace(experiment, score=None), after=("mine",))
        state(out / "score", score.reads(experiment, rows), overwrite=False)


def prepare_trial(experiment: Experiment, tune_folder: Path, trial: Trial) -> Prepared:
    """Makes all that a trial needs beside workers; a Ray runs.

    Raises:
        ValueError: the trial cannot be trained; says why.
        RuntimeError: its rows could not be mined or scored.
    """
    own = trial_experiment(experiment, tune_folder, trial, eval_steps=1)
    rows = _rows(experiment, own)
    check_rows(own, rows)
    check_model(own)
    steps = total_steps(own, rows)
    eval_steps = eval_steps_of(experiment, steps)
    assert own.train is not None
    own = replace(own, train=replace(own.train, eval_steps=eval_steps))
    tokenize_rows(own, rows, dev_split(own))
    return Prepared(trial, rows.folder, eval_steps, steps)


def total_steps(experiment: Experiment, rows: Store) -> int:
    """Steps of the optimiser in one training, as far as they are known before texts are tokenised."""
    train = experiment.train
    assert train is not None
    batches = total_batches(
        planned_batches(experiment, rows, read_datasets(rows, experiment)),
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        accumulation=train.gradient_accumulation_steps,
    )
    return batches // train.gradient_accumulation_steps


def eval_steps_of(experiment: Experiment, steps: int) -> int:
    """Steps between a trial's evaluations: train.eval_steps, else so that there are EVALUATIONS."""
    assert experiment.train is not None
    return experiment.train.eval_steps or math.ceil(steps / EVALUATIONS)


def _rows(experiment: Experiment, own: Experiment) -> Store:
    """The rows of a trial: what the experiment's jobs wrote, where the trial's own would write the same."""
    out = Path(experiment.output_dir)
    mined_in = own.output_dir
    if own.mine is not None:
        if (out / "mine").is_dir() and not changes(out / "mine", mine.reads(own)):
            mined_in = experiment.output_dir
        else:
            mine.run(own)
    rows, _ = training_rows(replace(own, output_dir=mined_in, score=None), after=("mine",))
    if own.score is None:
        return rows
    if (out / "score").is_dir() and not changes(out / "score", score.reads(own, rows)):
        return training_rows(replace(own, output_dir=experiment.output_dir), after=("score",))[0]
    score.run(own, rows=rows)
    return training_rows(own, after=("score",))[0]


def _other_inputs(dimensions: Sequence[Dimension], experiment: Experiment) -> list[Experiment | None]:
    """Experiments of points that may have rows of their own, each input once; None: too many to compare, or refused."""
    seen = dict[str, Point]()
    for point in points_to_check(dimensions, experiment.seed):
        kept = {key: value for key, value in point.items() if not key.startswith("train.")}
        if kept:
            seen.setdefault(in_words(kept), point)
    if len(seen) > MOST_COMPARED:
        return [None]
    found = list[Experiment | None]()
    for point in seen.values():
        try:
            found.append(with_point(experiment, point))
        except ConfigError:
            found.append(None)
    return found


def _mines_alike(experiment: Experiment, other: Experiment | None) -> bool:
    return other is not None and other.mine is not None and mine.reads(other) == mine.reads(experiment)


def _scores_alike(experiment: Experiment, other: Experiment | None) -> bool:
    """Whether another experiment with the same mined rows, or without any, has the same scores."""
    if other is None or other.score is None or (other.mine is None) != (experiment.mine is None):
        return False
    both = (training_rows(replace(one, score=None), after=("mine",))[0] for one in (experiment, other))
    return score.reads(other, next(both)) == score.reads(experiment, next(both))
