"""The job `run`: the jobs whose sections the experiment has, in order, then the report."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from rayembed.config import Experiment
from rayembed.jobs import check, evaluate, export, harvest, mine, score, train
from rayembed.jobs.session import shared_session
from rayembed.report import build_report
from rayembed.tracking.progress import duration

logger = logging.getLogger(__name__)
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
        _timed("harvest", lambda: harvest.run(experiment, overwrite=overwrite))
    check.run(experiment)
    with shared_session():
        for name in jobs:
            if name != "harvest":
                job = JOBS[name]
                _timed(name, lambda job=job: job.run(experiment, overwrite=overwrite))  # type: ignore[misc]
    report = build_report(out, title=out.name)
    logger.info("run: %s in %s; report: %s", ", ".join(jobs), duration(time.monotonic() - start), report)
    if experiment.evaluate is not None:
        logger.info("result: %s; model: %s", evaluate.summary(out / "evaluate"), out / "model")
    return out


def plan(experiment: Experiment) -> str:
    """The plan of every job; of one whose input is not there yet, what is missing."""
    lines = []
    for name in _jobs(experiment):
        try:
            lines.append(JOBS[name].plan(experiment))
        except (ValueError, FileNotFoundError) as error:
            lines.append(f"{name}: cannot be planned yet: {error}")
    return "\n".join(lines)


def _jobs(experiment: Experiment) -> list[str]:
    jobs = [name for name in JOBS if getattr(experiment, name) is not None]
    if not jobs:
        raise ValueError(f"the experiment has none of the sections {', '.join(JOBS)}; add those that should run")
    return jobs


def _timed(name: str, job: Callable[[], Path]) -> None:
    start = time.monotonic()
    where = job()
    logger.info("%s: %s (%s)", name, where, duration(time.monotonic() - start))
