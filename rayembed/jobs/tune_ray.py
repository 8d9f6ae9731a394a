"""The sweep on Ray Tune: a light actor a trial, which runs the job train of the trial's experiment.

What Ray 2.60 asks for (its source, and runs): a trial's actor is reserved beside its workers, and with a CPU each the
workers would wait for ever; so it takes none, and the number of trials at a time is computed. Metrics reach Tune by
a callback of Ray Train's controller. A trial that is stopped is killed, and its placement group is removed by an actor
that asks the dashboard, which is therefore always on.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune
from pydantic import TypeAdapter
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayembed.config import Experiment
from rayembed.config.ray import RayConfig
from rayembed.config.trials import section_of
from rayembed.config.tune import TuneConfig
from rayembed.config.uris import public_text
from rayembed.config.wording import counted
from rayembed.data.copies import as_here, registered
from rayembed.data.store import Store
from rayembed.jobs import train
from rayembed.jobs.as_trial import AsTrial
from rayembed.jobs.connection import ADDRESS, Resources, alive_nodes, resources_of_nodes, workers_with_room
from rayembed.jobs.session import log_from_worker
from rayembed.jobs.tune_prepare import Prepared, trial_experiment
from rayembed.jobs.tune_trials import Failure, Trial, forget_failure, is_refused, note_failure, read_trial, trial_folder

logger = logging.getLogger(__name__)
EVALUATION, OF = "evaluation", "evaluations"  # in what is told to Tune: the number of this one, and of all
FOLDER = ".ray"  # of Ray Tune's own files, which nobody needs afterwards
OF_A_NODE = "node:"  # begins the resource that each node has one of, by its address
SHARE = 0.001  # of it, that a trial's actor takes
MOST_EVALUATIONS = 10**6
HOPELESS = ("FloatingPointError", "OutOfMemoryError")  # of a worker: the same values would end the same again
ENVIRONMENT = {  # no files of Tune, no table of its settings, and Ctrl-C ends the command as it ends others
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
_EXPERIMENT = TypeAdapter(Experiment)
Ended = Callable[[Trial, float, bool], None]


def trials_at_once(config: TuneConfig, resources: RayConfig, nodes: Sequence[Resources]) -> int:
    """How many trials have room beside each other, each with all of its workers; at least one.

    Args:
        config: tune.max_concurrent limits it.
        resources: of a trial.
        nodes: what each node has.
    """
    room = workers_with_room(nodes, resources, use_gpu=resources.use_gpu) // resources.most_workers
    return max(1, min(room, config.max_concurrent or room))


def run_trials(
    experiment: Experiment,
    tune_folder: Path,
    *,
    choose: Callable[[], Prepared | None],
    ended: Ended,
    before: Sequence[Trial],
) -> None:
    """Runs trials until none is left.

    Args:
        experiment: with a section tune.
        tune_folder: of the sweep.
        choose: gives the next trial, or None where there is none; called when there is room for one.
        ended: takes each trial that has ended, how many seconds it took, and whether its process was lost.
        before: trials that ended before, which asha compares with.
    """
    config = section_of(experiment)
    at_once = trials_at_once(config, experiment.ray, resources_of_nodes())
    logger.info("tune: %s at a time, each on %s", counted(at_once, "trial"), experiment.ray.workers_in_words())
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # it misses those files
    shutil.rmtree(tune_folder / FOLDER, ignore_errors=True)
    told = {
        "experiment": _EXPERIMENT.dump_json(experiment).decode(),
        "tune_folder": str(tune_folder),
        "cwd": os.getcwd(),
        "copies": registered(),
    }
    ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(train_trial, **told), _on_this_node()),
        tune_config=ray.tune.TuneConfig(
            search_alg=Chosen(choose, ended),
            scheduler=scheduler_of(config, before),
            num_samples=-1,  # until no trial is left
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: str(trial.config["name"]),
        ),
        run_config=ray.tune.RunConfig(
            name=FOLDER,
            storage_path=str(tune_folder),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=config.max_failures),
        ),
    ).fit()
    shutil.rmtree(tune_folder / FOLDER, ignore_errors=True)


def _on_this_node() -> dict[str, float]:
    """What a trial's actor takes: nothing of what workers need, on the node that sees the data and outlives others."""
    here = ray.get_runtime_context().get_node_id()
    (own,) = [node["Resources"] for node in alive_nodes() if node["NodeID"] == here]
    name = next(name for name in own if name.startswith(OF_A_NODE) and not name.endswith("__"))
    return {"CPU": 0, name: SHARE}


def scheduler_of(config: TuneConfig, before: Sequence[Trial]) -> TrialScheduler:
    """What decides whether a trial goes on."""
    if config.scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call] # Ray types it not
    return Halving(config, before)


class Halving(ASHAScheduler):
    """Ray's ASHA, which knows the trials of earlier calls, and leaves two to their end.

    Those are the experiment as it is, which others are compared with, and what has no step left to be spared.
    """

    def __init__(self, config: TuneConfig, before: Sequence[Trial]) -> None:
        super().__init__(
            time_attr=EVALUATION,
            metric=config.metric,
            mode="max",
            max_t=MOST_EVALUATIONS,  # a trial ends by itself
            grace_period=config.grace_evaluations,
            reduction_factor=config.reduction_factor,
        )
        nobody: Any = None
        for trial in before:
            known: Any = SimpleNamespace(trial_id=trial.name)
            self.on_trial_add(nobody, known)
            found = trial.result.evaluations if trial.result is not None else []
            for number, (_, figure) in enumerate([own for own in found if own[0] > 0], start=1):
                super().on_trial_result(nobody, known, {EVALUATION: number, config.metric: figure})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401 - Ray's
        """Ray's answer, but for trials that are left to their end."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        spared = trial.config["to_the_end"] or result.get(EVALUATION, 0) >= result.get(OF, MOST_EVALUATIONS)
        return TrialScheduler.CONTINUE if spared else action


class Chosen(Searcher):
    """Gives Tune the trials that the sweep chooses, and tells the sweep when they have ended.

    Tune keeps states of its searcher to be restored from; this one's are the folders of the trials.
    """

    def __init__(self, choose: Callable[[], Prepared | None], ended: Ended) -> None:
        super().__init__()
        self._choose, self._ended = choose, ended
        self._running: dict[str, tuple[Trial, float]] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:  # noqa: ANN401 - Ray's
        """Tune asks; there is nothing to set."""
        return True

    def suggest(self, trial_id: str) -> Any:  # noqa: ANN401 - a word where there is none
        """The next trial; its values are in its folder."""
        chosen = self._choose()
        if chosen is None:
            return Searcher.FINISHED
        self._running[trial_id] = (chosen.trial, time.monotonic())
        return {
            "name": chosen.trial.name,
            "rows": str(chosen.rows),
            "eval_steps": chosen.eval_steps,
            OF: chosen.evaluations,
            "to_the_end": chosen.trial.baseline,
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Also of trials that are stopped."""
        trial, start = self._running.pop(trial_id)
        self._ended(trial, time.monotonic() - start, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing, in a file that Tune moves."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles it beside its states."""
        return {}


class Reports(TuneReportCallback):
    """Tells Tune of evaluations, by their number; in Ray Train's controller."""

    def __init__(self, metric: str, *, eval_steps: int, evaluations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Ray types it not
        self._metric, self._eval_steps, self._evaluations = metric, eval_steps, evaluations

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ANN401 - Ray's
        """Leaves out checkpoints without an evaluation, and the base model."""
        found = metrics[0]
        if self._metric in found and found["step"]:
            number = min(-(-found["step"] // self._eval_steps), self._evaluations)
            told = {EVALUATION: number, OF: self._evaluations, "step": found["step"], self._metric: found[self._metric]}
            super().after_report(run_context, [told], None)


def train_trial(
    config: dict[str, Any], *, experiment: str, tune_folder: str, cwd: str, copies: Sequence[Sequence[str]]
) -> None:
    """Runs in a trial's actor: the job train, from its last checkpoint where it was begun before."""
    config, experiment, tune_folder = as_here([config, experiment, tune_folder], copies)
    if os.path.isdir(cwd):
        os.chdir(cwd)  # relative paths of the experiment are the driver's
    folder = trial_folder(Path(tune_folder), config["name"])
    trial = read_trial(folder)
    forget_failure(folder)
    name = f"trial {trial.number}"
    log_from_worker(name)
    _name_this_ray()
    own = trial_experiment(
        _EXPERIMENT.validate_json(experiment), Path(tune_folder), trial, eval_steps=config["eval_steps"]
    )
    assert own.train is not None
    reports = Reports(own.train.metric_for_best_model, eval_steps=config["eval_steps"], evaluations=config[OF])
    try:
        train.run(own, trial=AsTrial(name, Store.open(Path(config["rows"])), (reports,)))
    except (ValueError, OSError, RuntimeError) as error:
        hopeless = is_refused(error) or any(kind in str(error) for kind in HOPELESS)
        note_failure(folder, Failure(str(error), again=not hopeless))
        if not hopeless:
            raise RuntimeError(public_text(str(error))) from None  # Tune logs it


def _name_this_ray() -> None:
    """Tells the actors of Ray Train below which Ray is theirs.

    The one that removes the placement group of a trial that was stopped asks the dashboard, of whatever Ray it finds on
    the machine, and gives up where there are several; the place would then never be free again.
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    os.environ[ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(ADDRESS)
