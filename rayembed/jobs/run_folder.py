"""Run folders, caches and harvests that lie on object stores: jobs work on copies of them (rayembed/data/mirror.py)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from rayembed.config import Experiment
from rayembed.config.places import written_folder
from rayembed.data import mirror
from rayembed.data.copies import any_mirror, is_mirrored, local, lock_of, shown, uri_of
from rayembed.data.locks import give_back, holds, take

__all__ = ["AtWorkError", "as_asked", "beside_run_folder", "in_run_folder", "shown"]
P = ParamSpec("P")
T = TypeVar("T")
CACHE = "cache"
WAIT_S = 20.0  # for a look at the run folder that another command takes
Job = Callable[Concatenate[Experiment, P], T]


class AtWorkError(RuntimeError):
    """Another command of this machine works in the same run folder of an object store."""


def in_run_folder(job: Job[P, T]) -> Job[P, T]:
    """A job that works on copies of what the experiment has on object stores, and leaves there what it wrote.

    Units and folders are sent when they are whole; this sends at the end what the job wrote beside them. One command of
    a machine at a time does so: it removes and replaces what differs from the store, as does what another is writing.
    """

    @wraps(job)
    def on_copies(experiment: Experiment, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found, folders = _with_copies(experiment)
        with _taken(folders, seconds=WAIT_S) as alone:
            for folder in set(folders) - alone:
                raise AtWorkError(
                    f"another command on this machine works in {shown(folder)}; wait for its end, or set another "
                    "output_dir"
                )
            _refresh(found, folders, alone)
            result = job(found, *args, **kwargs)
            if is_mirrored(found.output_dir):
                mirror.send_folder(Path(found.output_dir), but=[CACHE])
            return result

    return on_copies


def beside_run_folder(plan: Job[P, T]) -> Job[P, T]:
    """What looks at the copies that jobs work on, and leaves alone what a command at work is writing there."""

    @wraps(plan)
    def on_copies(experiment: Experiment, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found, folders = _with_copies(experiment)
        with _taken(folders, seconds=0) as alone:
            _refresh(found, folders, alone)
            return plan(found, *args, **kwargs)

    return on_copies


@contextmanager
def _taken(folders: Sequence[Path], *, seconds: float) -> Iterator[set[Path]]:
    """Those of the copies in which no other command is at work, for as long as this goes on."""
    files = {folder: lock for folder in folders if (lock := lock_of(folder)) is not None}
    before = {folder for folder, file in files.items() if holds(file)}
    taken = {folder for folder in files if folder in before or take(files[folder], seconds=seconds)}
    try:
        yield taken | (set(folders) - set(files))
    finally:
        for folder in taken - before:
            give_back(files[folder])


def _refresh(experiment: Experiment, folders: Sequence[Path], alone: set[Path]) -> None:
    for folder in folders:
        mirror.refresh(folder, alone=folder in alone)
    if folders:
        mirror.model_here(_models(experiment))


def _with_copies(experiment: Experiment) -> tuple[Experiment, list[Path]]:
    """The experiment with paths of copies in place of the URIs that jobs write to, and those copies.

    An experiment without such URIs is given back as it is.
    """
    out, cache, harvest = experiment.output_dir, experiment.cache_dir, experiment.harvest
    out = str(local(out)) if "://" in out else out
    if cache is not None and "://" in cache:
        cache = str(local(cache, shared=True))
    if harvest is not None and "://" in harvest.output:
        harvest = replace(harvest, output=str(local(written_folder(harvest.output))))
    folders = [out, cache or out, out if harvest is None else harvest.output]
    mirrored = [Path(folder) for folder in dict.fromkeys(folders) if is_mirrored(folder)]
    if not mirrored:
        return experiment, []
    return replace(experiment, output_dir=out, cache_dir=cache, harvest=harvest), mirrored


def as_asked(experiment: Experiment) -> Experiment:
    """The experiment as its user wrote it, with URIs in place of copies."""
    if not any_mirror():
        return experiment
    cache, harvest, model = experiment.cache_dir, experiment.harvest, experiment.model
    return replace(
        experiment,
        output_dir=uri_of(experiment.output_dir),
        model=replace(model, name_or_path=uri_of(model.name_or_path)),
        cache_dir=cache and uri_of(cache),
        harvest=harvest and replace(harvest, output=uri_of(harvest.output)),
    )


def _models(experiment: Experiment) -> list[str]:
    """Models that are read; a round's is in the run folder of the round before."""
    mine, score = experiment.mine, experiment.score
    named = [
        experiment.model.name_or_path,
        None if mine is None else mine.model,
        None if score is None else score.model,
        experiment.encode.model,
    ]
    return [name for name in named if name is not None]
