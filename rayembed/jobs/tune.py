"""The job `tune`: a sweep over settings of the experiment, and the best of it trained where that is asked for."""

import logging
import math
from pathlib import Path

import torch
from joblib import cpu_count

from rayembed.config import Experiment
from rayembed.config.trials import check_space, section_of
from rayembed.config.wording import counted
from rayembed.data import mirror
from rayembed.data.copies import shown
from rayembed.data.store import Store
from rayembed.jobs import estimates, evaluate, export, mine, score, train
from rayembed.jobs.connection import Resources
from rayembed.jobs.dev_split import DevSplit, dev_split
from rayembed.jobs.inputs import check_rows, not_done, planned_rows
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.session import shared_session
from rayembed.jobs.tune_prepare import eval_steps_of, total_steps, trial_experiment
from rayembed.jobs.tune_ray import trials_at_once
from rayembed.jobs.tune_results import best_experiment, best_of
from rayembed.jobs.tune_sweep import FOLDER, begun_trials, number_of_trials, sweep
from rayembed.jobs.tune_trials import Trial
from rayembed.report import build_report
from rayembed.tracking.progress import duration

logger = logging.getLogger(__name__)
WINNER = {"mine": mine, "score": score, "train": train, "evaluate": evaluate, "export": export}
START_S = 20.0  # of a trial's actor and workers, and their end


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Runs the trials that are missing; with tune.then, trains, evaluates and exports with the best values.

    Args:
        experiment: sections tune, train, data, model; mine and score where the rows come from them.
        overwrite: begin anew what was made with another space or experiment.

    Returns:
        OUTPUT_DIR/tune: results.parquet, best.yaml, trials/. OUTPUT_DIR/report.html shows it.

    Raises:
        ValueError: the space, or the experiment at some point of it, is refused; nothing was started.
        NothingFoundError: no trial has a figure.
    """
    out = Path(experiment.output_dir)
    with shared_session():
        trials = sweep(experiment, overwrite=overwrite)
        if section_of(experiment).then == "train":
            best = best_experiment(experiment, best_of(trials).changed)
            for name, job in WINNER.items():
                if getattr(best, name) is not None:
                    job.run(best, overwrite=overwrite)
    mirror.refresh(out)  # of the winner's training: its figures
    logger.info("tune: report: %s", shown(build_report(out, title=out.name)))
    return out / FOLDER


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do: trials, how many at a time on this machine, steps, about how long."""
    check_space(experiment)
    begun = begun_trials(experiment, overwrite=overwrite)
    config, folder = section_of(experiment), Path(experiment.output_dir) / FOLDER
    rows, source = planned_rows(experiment, after=("score", "mine"))
    own = trial_experiment(experiment, folder, Trial(0, {}, baseline=True), eval_steps=1)
    check_rows(own, rows, coming=tuple(job for job in ("score", "mine") if not_done(experiment, job)))
    train.check_model(own)
    dev = dev_split(own)
    assert dev is not None
    steps = total_steps(own, rows)
    every, most = eval_steps_of(experiment, steps), number_of_trials(experiment)
    done = len([trial for trial in begun if trial.result is not None])
    at_once = trials_at_once(config, experiment.ray, [_this_machine()])
    seconds = _seconds(own, rows, steps, dev, 1 + math.ceil(steps / every))
    early = "; asha stops most of them earlier" if config.scheduler == "asha" else ""
    return (
        f"tune: {counted(most, 'trial')} ({config.search} over {', '.join(config.space)}), {done:,} of them done; each "
        f"has {counted(steps, 'step')} on {counted(rows.num_rows, 'row')} of {source}, and every "
        f"{counted(every, 'step')} an evaluation by {config.metric}, {dev.words}; {at_once} at a time on this "
        f"machine, each on {experiment.ray.workers_in_words()}; about {duration(seconds)} a trial, "
        f"{duration(seconds * math.ceil(max(0, most - done) / at_once))} for what is left{early}"
    )


def _seconds(own: Experiment, rows: Store, steps: int, dev: DevSplit, evaluations: int) -> float:
    """Of one trial that is not stopped."""
    assert own.train is not None
    training = estimates.training_seconds(own, rows, steps * own.train.gradient_accumulation_steps)
    texts = {side: (dev.store(side), dev.num_texts(side)) for side in dev.rows}
    return START_S + training + evaluations * estimates.evaluation_seconds(own, texts)


def _this_machine() -> Resources:
    return {"CPU": cpu_count(), "GPU": torch.cuda.device_count()}
