"""A sweep from its beginning, or from where it was left, to its table."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.config.space import Point, all_points
from rayembed.config.trials import baseline, check_space, in_words, section_of
from rayembed.config.tune import NUM_SAMPLES
from rayembed.config.uris import without_keys_within
from rayembed.data import mirror
from rayembed.data.copies import shown
from rayembed.data.storage import fingerprint, working_folder, write_changed
from rayembed.jobs import mine
from rayembed.jobs.folders import RECORD, ChangedError, Reads, changes
from rayembed.jobs.inputs import training_rows
from rayembed.jobs.run_folder import as_asked
from rayembed.jobs.session import ray_session
from rayembed.jobs.teacher import teacher_reads
from rayembed.jobs.train_reads import read_beside
from rayembed.jobs.tune_prepare import Prepared, check_shared, compared_on, prepare_shared, prepare_trial
from rayembed.jobs.tune_ray import run_trials
from rayembed.jobs.tune_results import best_experiment, best_of, table_in_words, write_results
from rayembed.jobs.tune_search import next_point
from rayembed.jobs.tune_trials import (
    Failure,
    Trial,
    begin,
    end,
    is_refused,
    known_trials,
    name_of,
    note_failure,
    trial_folder,
)
from rayembed.models.loading import weights_fingerprint

logger = logging.getLogger(__name__)
FOLDER = "tune"
MOST_COUNTED = 100_000
NOT_THE_RESULT = {  # of section train: what a trial's figure does not depend on
    *("save_steps", "save_minutes", "save_total_limit", "save_best", "logging_steps", "tokens_per_chunk"),
    *("per_device_train_batch_size", "global_batch_size", "metric_for_best_model", "load_best_model_at_end"),
    "deepspeed",  # a file: told by what is in it
}
FILES = ("train", "corpus", "evaluation")  # of section data: told by what is in them


def sweep(experiment: Experiment, *, overwrite: bool = False) -> list[Trial]:
    """Runs what is missing of a sweep: trials that were not finished, and new ones up to tune.num_samples.

    Args:
        experiment: with sections tune and train; mine and score where the rows come from them.
        overwrite: begin anew what was made with another space or experiment.

    Returns:
        All trials, in the order in which they were chosen. OUTPUT_DIR/tune has the table and the best experiment.

    Raises:
        ConfigError: the space does not fit the experiment.
        ChangedError: the sweep was begun with another space or experiment.
        NothingFoundError: no trial has a figure.
        ValueError: the experiment cannot be evaluated on its dev split.
    """
    check_space(experiment)
    folder = Path(experiment.output_dir) / FOLDER
    _claim(experiment, folder, overwrite=overwrite)
    course = Course(experiment, folder)
    if course.is_done():
        logger.info("%s: all %d trials are done", shown(folder), len(course.trials))
    else:
        with ray_session(experiment):
            prepare_shared(experiment, overwrite=overwrite)
            run_trials(experiment, folder, choose=course.choose, ended=course.ended, before=course.trials)
    write_results(experiment, folder, course.trials)
    if not section_of(experiment).keep_models:
        mirror.refresh(folder)  # workers of trials that were stopped may have left something after their end
        for trial in course.trials:
            if not _is_unfinished(trial):
                _remove_models(trial_folder(folder, trial.name))
    for line in table_in_words(experiment, course.trials):
        logger.info("tune: %s", line)
    best = best_of(course.trials)
    logger.info("tune: the best is trial %d: %s", best.number, in_words(best.values))
    return course.trials


def number_of_trials(experiment: Experiment) -> int:
    """Trials that the sweep is to have in all; a grid of more than MOST_COUNTED is counted so far."""
    config = section_of(experiment)
    if config.num_samples is not None or config.search != "grid":
        return config.num_samples or NUM_SAMPLES
    points = [name_of(point) for point in islice(all_points(config.dimensions()), MOST_COUNTED)]
    return len({*points, *([name_of(baseline(experiment))] if config.baseline else [])})


class Course:
    """Which trials there are, which comes next."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        """Reads what earlier calls left in the sweep's folder."""
        self._experiment, self._folder, self._config = experiment, folder, section_of(experiment)
        self._trials = {trial.name: trial for trial in known_trials(folder)}
        self._most = number_of_trials(experiment)
        self._left = [trial for trial in self._trials.values() if _is_unfinished(trial)]

    @property
    def trials(self) -> list[Trial]:
        """Those that were begun, in the order in which they were chosen."""
        return list(self._trials.values())

    def is_done(self) -> bool:
        """Whether no trial is left to run."""
        return not self._left and self._new_point() is None

    def choose(self) -> Prepared | None:
        """The next trial that can start; None where none is left. What cannot start has failed."""
        while (trial := self._next()) is not None:
            begin(self._folder, trial)
            logger.info("tune: trial %d (%s): %s", trial.number, trial.name, in_words(trial.values))
            try:
                return prepare_trial(self._experiment, self._folder, trial)
            except (ValueError, OSError, RuntimeError) as error:
                failure = Failure(str(error), again=not is_refused(error))
                note_failure(trial_folder(self._folder, trial.name), failure)
                self.ended(trial, 0.0, False)
        return None

    def ended(self, trial: Trial, seconds: float, lost: bool) -> None:
        """Takes a trial that has ended."""
        own = end(self._folder, trial, metric=self._config.metric, seconds=seconds, lost=lost)
        self._trials[trial.name] = own
        result = own.result
        assert result is not None
        figure = f", {self._config.metric} {result.best[1]:.4f} at step {result.best[0]}" if result.best else ""
        why = f": {result.failure.error}" if result.failure is not None else ""
        logger.info("tune: trial %d is %s after %.0f s%s%s", trial.number, result.status, seconds, figure, why)
        write_results(self._experiment, self._folder, self.trials)
        if result.status == "done" and not self._config.keep_models:
            _remove_models(trial_folder(self._folder, trial.name))

    def _next(self) -> Trial | None:
        if self._left:
            return self._left.pop(0)
        point = self._new_point()
        if point is None:
            return None
        number = max((trial.number for trial in self._trials.values()), default=-1) + 1
        as_it_is = self._config.baseline and point == baseline(self._experiment)
        trial = self._trials[name_of(point)] = Trial(number, point, as_it_is)
        return trial

    def _new_point(self) -> Point | None:
        """A point that was not tried, where the sweep is to have more."""
        if len(self._trials) >= self._most:
            return None
        as_it_is = baseline(self._experiment)
        if self._config.baseline and name_of(as_it_is) not in self._trials:
            return as_it_is
        dimensions, seed = self._config.dimensions(), self._experiment.seed
        return next_point(self._config.search, dimensions, seed=seed, known=self.trials)


def _is_unfinished(trial: Trial) -> bool:
    result = trial.result
    return result is None or (result.failure is not None and result.failure.again)


def _claim(experiment: Experiment, folder: Path, *, overwrite: bool) -> None:
    """Takes the folder for this sweep, or refuses one of another.

    Raises:
        ChangedError: says what changed.
    """
    reads, found = _reads(experiment), _changes(experiment, folder)
    if not overwrite:
        _refuse_changes(folder, found)
    if found or not (folder / RECORD).is_file():
        mirror.remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_changed(folder / "config.yaml", dump(as_asked(experiment)).encode())
    write_changed(folder / RECORD, json.dumps(reads, indent=1, sort_keys=True).encode())


def begun_trials(experiment: Experiment, *, overwrite: bool) -> list[Trial]:
    """Trials that `sweep` would go on with; none where it would begin anew. Does nothing.

    Raises:
        ChangedError: `sweep` would refuse the folder of the sweep, or that of rows that its trials share.
    """
    folder = Path(experiment.output_dir) / FOLDER
    found = _changes(experiment, folder)
    if not overwrite:
        _refuse_changes(folder, found)
    if found:
        return []
    course = Course(experiment, folder)
    if not overwrite and not course.is_done():
        check_shared(experiment)
    return course.trials


def best_so_far(experiment: Experiment) -> Experiment | None:
    """The experiment with the best values of its sweep; None: the sweep is not at its end, or is one of another.

    Raises:
        NothingFoundError: no trial has a figure.
    """
    folder = Path(experiment.output_dir) / FOLDER
    if not (folder / RECORD).is_file() or _changes(experiment, folder):
        return None
    course = Course(experiment, folder)
    return best_experiment(experiment, best_of(course.trials).changed) if course.is_done() else None


def _changes(experiment: Experiment, folder: Path) -> list[str]:
    """What changed since the sweep began, a line each."""
    return changes(folder, _reads(experiment)) if (folder / RECORD).is_file() else []


def _refuse_changes(folder: Path, found: Sequence[str]) -> None:
    if found:
        lines = "\n  ".join(found)
        raise ChangedError(
            f"{shown(folder)} is a sweep of something else:\n  {lines}\nIts trials cannot be compared with new ones: "
            "use --overwrite to begin anew, another output_dir to keep both, or set the settings back"
        )


def _reads(experiment: Experiment) -> Reads:
    """What the trials have in common; how they are searched and how many they are may change."""
    config, train, data = section_of(experiment), experiment.train, asdict(experiment.data)
    assert train is not None
    rows, _ = training_rows(experiment, after=())
    dev = compared_on(experiment)
    found: Reads = {
        "metric": config.metric,
        "space": config.space,
        "seed": experiment.seed,
        "rows": rows.fingerprint,
        "dev": {
            "queries": dev.evaluation.queries.fingerprint,
            "passages": dev.evaluation.corpus.fingerprint,
            "judgements": fingerprint(dev.judgements),
        },
        "weights": weights_fingerprint(experiment.model.name_or_path),
        "model": {**asdict(experiment.model), "name_or_path": None},
        "data": {key: value for key, value in data.items() if key not in FILES},
        "train": {key: value for key, value in asdict(train).items() if key not in NOT_THE_RESULT},
        **read_beside(experiment),
        "encode": [experiment.max_len(side) for side in ("query", "passage")],
        **{name: asdict(section) for name, section in experiment.family_sections().items()},
    }
    if experiment.mine is not None:
        found["mine"] = mine.reads(experiment)
    if experiment.score is not None:
        found["score"] = teacher_reads(experiment)
    plain: Reads = json.loads(json.dumps(without_keys_within(found), default=str))
    return plain


def _remove_models(folder: Path) -> None:
    """What a trial does not need any more, and is large."""
    train = folder / "train"
    for path in (folder / "model", train / "checkpoints", working_folder(train) / "checkpoints"):
        if path.is_dir():
            mirror.remove(path)
