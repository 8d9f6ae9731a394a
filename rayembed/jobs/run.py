"""The job `run`: the jobs whose sections the experiment has, in order, then the report."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.config.trials import check_space
from rayembed.config.wording import counted
from rayembed.data import mirror
from rayembed.data.copies import shown
from rayembed.data.storage import write_atomic
from rayembed.jobs import check, evaluate, export, harvest, mine, score, train, tune
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.inputs import NotYetError
from rayembed.jobs.rounds import FOLDER, Round, rounds_of
from rayembed.jobs.run_folder import as_asked, beside_run_folder, in_run_folder
from rayembed.jobs.session import shared_session
from rayembed.jobs.tune_results import best_experiment, best_of
from rayembed.jobs.tune_sweep import best_so_far, sweep
from rayembed.report import build_report
from rayembed.tracking.progress import duration

logger = logging.getLogger(__name__)
BEFORE_ROUNDS = ("harvest", "tune")
TRAINS = ("mine", "score", "train")
JOBS = {
    **{"harvest": harvest, "mine": mine, "score": score, "tune": tune},
    **{"train": train, "evaluate": evaluate, "export": export},
}


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Does what is not done yet.

    Args:
        experiment: its sections say which jobs.
        overwrite: do again what was made from something else.

    Returns:
        OUTPUT_DIR, with report.html.

    Raises:
        ValueError: the data have errors (found before any worker starts), or a job's own reason.
    """
    out = Path(experiment.output_dir)
    start = time.monotonic()
    jobs = _jobs(experiment)
    if experiment.tune is not None:
        check_space(experiment)
    if "harvest" in jobs:
        _timed("harvest", partial(harvest.run, experiment, overwrite=overwrite))
    check.run(experiment)
    _check_rounds(experiment, overwrite=overwrite)
    with shared_session():
        experiment, left = _tuned(experiment, jobs, overwrite=overwrite)
        for some in _rounds(experiment):
            for name in left:
                asked = some.trains if name in TRAINS else some.compares
                if name != "harvest" and getattr(asked, name) is not None:
                    _timed(name, partial(JOBS[name].run, asked, overwrite=overwrite))
    write_atomic(out / "config.yaml", dump(as_asked(experiment)).encode())  # a round's jobs write that of their round
    mirror.refresh(out)
    harvested = None if experiment.harvest is None else experiment.harvest.output
    report = build_report(out, title=out.name, harvest=harvested)
    logger.info("run: %s in %s; report: %s", ", ".join(jobs), duration(time.monotonic() - start), shown(report))
    if "evaluate" in left:
        logger.info("result: %s; model: %s", evaluate.summary(out / "evaluate"), shown(out / "model"))
    return out


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """The plan of every job; of one whose input is not there yet, what is missing.

    Args:
        experiment: see `run`.
        overwrite: see `run`.

    Raises:
        ValueError: a job could not be done, whatever the jobs before it write; holds all plans.
    """
    if experiment.tune is not None:
        check_space(experiment)
    _check_rounds(experiment, overwrite=overwrite)
    lines, mistakes, jobs = [], False, _jobs(experiment)
    if experiment.tune is not None and experiment.tune.then is None:
        jobs = jobs[: jobs.index("tune") + 1]
    best = _best_so_far(experiment)
    rounds = _rounds(best or experiment)
    to_harvest = experiment.harvest is not None and not Path(experiment.harvest.output).is_dir()
    for name in jobs:
        try:
            asked = experiment if name in BEFORE_ROUNDS else rounds[0].compares
            lines.append(JOBS[name].plan(asked, overwrite=overwrite))
        except ChangedError as error:
            waits = name not in BEFORE_ROUNDS and experiment.tune is not None and best is None
            mistakes |= not waits
            lines.append(f"{name}: {'is not compared before the end of tune' if waits else 'cannot be done'}: {error}")
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            waits = isinstance(error, NotYetError) or to_harvest
            mistakes |= not waits
            lines.append(f"{name}: cannot be {'planned yet' if waits else 'done'}: {error}")
    if len(rounds) > 1:
        lines.append(
            f"rounds: {len(rounds)} times mine to evaluate; each but the first with the model of the one before"
        )
    if mistakes:
        raise ValueError("\n".join(["this run would fail", *lines]))
    return "\n".join(lines)


def _best_so_far(experiment: Experiment) -> Experiment | None:
    """What the jobs after a sweep that is at its end would be done with; None: that is not known."""
    if experiment.tune is None or experiment.tune.then is None:
        return None
    try:
        return best_so_far(experiment)
    except (ValueError, FileNotFoundError):  # the data cannot be read, and the plan of tune says why
        return None


def _tuned(experiment: Experiment, jobs: list[str], *, overwrite: bool) -> tuple[Experiment, list[str]]:
    """The experiment with the best values of its sweep, and the jobs that follow: none, where the sweep is the end."""
    if experiment.tune is None:
        return experiment, jobs
    start = time.monotonic()
    trials = sweep(experiment, overwrite=overwrite)
    logger.info("tune: %s (%s)", counted(len(trials), "trial"), duration(time.monotonic() - start))
    if experiment.tune.then is None:
        return experiment, []
    return best_experiment(experiment, best_of(trials).changed), [name for name in jobs if name != "tune"]


def _rounds(experiment: Experiment) -> list[Round]:
    """One, with the experiment as it is, where nothing asks for more."""
    if experiment.mine is None or experiment.mine.rounds == 1:
        return [Round(1, experiment, experiment)]
    return rounds_of(experiment)


def _check_rounds(experiment: Experiment, *, overwrite: bool) -> None:
    """Refuses another number of rounds than OUTPUT_DIR was made with, before the first of them is mined anew.

    Raises:
        ChangedError: names both numbers.
    """
    out = Path(experiment.output_dir)
    if experiment.mine is None or overwrite or not ((out / FOLDER).exists() or experiment.mine.rounds > 1):
        return
    was = len([path for path in (out / FOLDER).glob("*") if path.name.isdigit()]) + 1
    if (out / "mine").exists() and was != experiment.mine.rounds:
        raise ChangedError(
            f"{shown(out)} was made in {counted(was, 'round')}, and mine.rounds is {experiment.mine.rounds}; set it "
            "as it was, choose another output_dir (with cache_dir as it is, vectors are not made again), or use "
            "--overwrite"
        )


def _jobs(experiment: Experiment) -> list[str]:
    jobs = [name for name in JOBS if getattr(experiment, name) is not None]
    if not jobs:
        raise ValueError(f"the experiment has none of the sections {', '.join(JOBS)}; add those that should run")
    return jobs


def _timed(name: str, job: Callable[[], Path]) -> None:
    start = time.monotonic()
    where = job()
    logger.info("%s: %s (%s)", name, shown(where), duration(time.monotonic() - start))
