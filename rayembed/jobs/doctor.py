"""The job `doctor`: looks at the machine, Ray, storage and models before a run, and says what to do; changes nothing.

A new check is a function from the experiment, if there is one, to findings, and a row in the table.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

from rayembed.config import Experiment
from rayembed.jobs import doctor_experiment, doctor_machine, doctor_ray
from rayembed.jobs.doctor_machine import Finding

logger = logging.getLogger(__name__)
Check = Callable[[Experiment | None], Iterator[Finding]]
CHECKS: Mapping[str, Check] = {  # by what the row is called where the check itself fails
    "Python": doctor_machine.python_version,
    "packages": doctor_machine.packages,
    "GPUs": doctor_machine.gpus,
    "compilers": doctor_machine.compilers,
    "memory": doctor_machine.memory,
    "disks": doctor_machine.disks,
    "open files": doctor_machine.open_files,
    "storage": doctor_experiment.storages,
    "models": doctor_experiment.models,
    "Ray's address": doctor_ray.address,
    "Ray's token": doctor_ray.authentication,
}
OF_RAY: Mapping[str, Check] = {"Ray": doctor_ray.cluster}  # starts or connects to one


class DoctorError(RuntimeError):
    """Something is wrong that a run would fail of."""


def run(experiment: Experiment | None, *, overwrite: bool = False) -> str:
    """Logs a line for each finding.

    Args:
        experiment: what it names is looked at too. None: the machine and Ray alone.
        overwrite: has no meaning here; every job takes it.

    Returns:
        How many findings of each level there are.

    Raises:
        DoctorError: at least one is an error.
    """
    with ExitStack() as stack:
        stack.callback(doctor_ray.end)
        return _examined(experiment, {**CHECKS, **OF_RAY})


def plan(experiment: Experiment | None, *, overwrite: bool = False) -> str:
    """The same without starting Ray."""
    return _examined(experiment, CHECKS)


def _examined(experiment: Experiment | None, checks: Mapping[str, Check]) -> str:
    counts = {"ok": 0, "warning": 0, "error": 0}
    for name, check in checks.items():
        try:
            for finding in check(experiment):
                counts[finding.level] += 1
                logger.info(in_words(finding))
        except Exception as error:  # one look that fails must not keep the others from being taken
            counts["warning"] += 1
            told = f"could not be looked at: {type(error).__name__}: {error}"
            logger.info(in_words(Finding("warning", name, told, "tell us of it")))
    summary = ", ".join(f"{count} {level}" for level, count in counts.items())
    if counts["error"]:
        raise DoctorError(f"doctor: {summary}; each of the errors above says what to do")
    return summary


def in_words(finding: Finding) -> str:
    """The row: level, what was looked at, what was found, and in a line below it what to do."""
    row = f"{finding.level:<8}{finding.what}: {finding.found}"
    return f"{row}\n          -> {finding.advice}" if finding.advice else row
