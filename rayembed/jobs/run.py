"""The job `run`: the jobs whose sections the experiment has, in order, then the report."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.data.storage import write_atomic
from rayembed.jobs import check, evaluate, export, harvest, mine, score, train
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.inputs import NotYetError
from rayembed.jobs.rounds import FOLDER, Round, rounds_of
from rayembed.jobs.session import shared_session
from rayembed.report import build_report
from rayembed.tracking.progress import duration

logger = logging.getLogger(__name__)
TRAINS = ("mine", "score", "train")
JOBS = {"harvest": harvest, "mine": mine, "score": score, "train": train, "evaluate": evaluate, "export": export}


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
    if "harvest" in jobs:
        _timed("harvest", partial(harvest.run, experiment, overwrite=overwrite))
    check.run(experiment)
    _check_rounds(experiment, overwrite=overwrite)
    with shared_session():
        for some in _rounds(experiment):
            for name in jobs:
                asked = some.trains if name in TRAINS else some.compares
                if name != "harvest" and getattr(asked, name) is not None:
                    _timed(name, partial(JOBS[name].run, asked, overwrite=overwrite))
    write_atomic(out / "config.yaml", dump(experiment).encode())  # a round's jobs write that of their round
    report = build_report(out, title=out.name)
    logger.info("run: %s in %s; report: %s", ", ".join(jobs), duration(time.monotonic() - start), report)
    if experiment.evaluate is not None:
        logger.info("result: %s; model: %s", evaluate.summary(out / "evaluate"), out / "model")
    return out


def plan(experiment: Experiment) -> str:
    """The plan of every job; of one whose input is not there yet, what is missing.

    Raises:
        ValueError: a job could not be done, whatever the jobs before it write; holds all plans.
    """
    lines, rounds, mistakes = [], _rounds(experiment), False
    to_harvest = experiment.harvest is not None and not Path(experiment.harvest.output).is_dir()
    for name in _jobs(experiment):
        try:
            lines.append(JOBS[name].plan(experiment if name == "harvest" else rounds[0].compares))
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
            f"{out} was made in {was} rounds, and mine.rounds is {experiment.mine.rounds}; set it as it was, choose "
            "another output_dir (with cache_dir as it is, vectors are not made again), or use --overwrite"
        )


def _jobs(experiment: Experiment) -> list[str]:
    jobs = [name for name in JOBS if getattr(experiment, name) is not None]
    if not jobs:
        raise ValueError(f"the experiment has none of the sections {', '.join(JOBS)}; add those that should run")
    return jobs


def _timed(name: str, job: Callable[[], Path]) -> None:
    start = time.monotonic()
    where = job()
    logger.info("%s: %s (%s)", name, where, duration(time.monotonic() - start))
