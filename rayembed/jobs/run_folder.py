"""Run folders, caches and harvests that lie on object stores: jobs work on copies of them (rayembed/data/mirror.py)."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from rayembed.config import Experiment
from rayembed.config.places import written_folder
from rayembed.data import mirror
from rayembed.data.copies import any_mirror, is_mirrored, local, shown, uri_of

__all__ = ["as_asked", "in_run_folder", "shown", "with_copies"]
P = ParamSpec("P")
T = TypeVar("T")
CACHE = "cache"
Job = Callable[Concatenate[Experiment, P], T]


def in_run_folder(job: Job[P, T]) -> Job[P, T]:
    """A job that works on copies of what the experiment has on object stores, and leaves there what it wrote.

    Units and folders are sent when they are whole; this sends at the end what the job wrote beside them.
    """

    @wraps(job)
    def on_copies(experiment: Experiment, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found = with_copies(experiment)
        result = job(found, *args, **kwargs)
        if is_mirrored(found.output_dir):
            mirror.send_folder(Path(found.output_dir), but=[CACHE])
        return result

    return on_copies


def with_copies(experiment: Experiment) -> Experiment:
    """The experiment with paths of copies in place of the URIs that jobs write to; the copies show what is there now.

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
        return experiment
    for folder in mirrored:
        mirror.refresh(folder)
    asked = replace(experiment, output_dir=out, cache_dir=cache, harvest=harvest)
    mirror.model_here(_models(asked))
    return asked


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
