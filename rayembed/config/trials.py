"""Experiments of a sweep: the experiment with a point's values, and the check of its whole space before it starts."""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rayembed.config.experiment import Experiment
from rayembed.config.loading import ConfigError, nearest, with_values
from rayembed.config.schema import ADAPTER, sections, settings
from rayembed.config.space import Dimension, Point, all_points, point_of, random_point
from rayembed.config.tune import TuneConfig
from rayembed.config.uris import without_keys_within

MOST_CHECKED = 500  # points; the check of one takes about a millisecond
TOLD = 5  # refused points that are named
_ITS_OWN = "every trial has a folder of its own, and the cache is shared"
_NO_PART = "it is no part of a trial, and all values would do as well"
_COMPARED = "trials are compared by it, so that it is the same for all"
REFUSED = {  # settings and sections that no dimension may be
    "output_dir": _ITS_OWN,
    "cache_dir": _ITS_OWN,
    **dict.fromkeys(("harvest", "evaluate", "export", "split", "merge", "tune", "mine.rounds"), _NO_PART),
    "ray": "it says where a trial runs and not what it learns; take train.global_batch_size for the batch",
    **dict.fromkeys(("data.evaluation", "data.evaluation_split", "data.dev_split"), _COMPARED),
    **dict.fromkeys(("train.eval_steps", "train.eval_passages", "train.eval_queries"), _COMPARED),
    "train.metric_for_best_model": "a sweep compares by tune.metric",
}


def section_of(experiment: Experiment) -> TuneConfig:
    """The section tune.

    Raises:
        ConfigError: there is none.
    """
    if experiment.tune is None:
        raise ConfigError(
            "the experiment has no section tune; add one, as in tune: {space: {train.temperature: {choice: [0.01, "
            "0.05]}}}"
        )
    return experiment.tune


def with_point(experiment: Experiment, point: Point) -> Experiment:
    """The experiment with a point's values and without the section tune.

    Raises:
        ConfigError: a value is refused.
    """
    return with_values(experiment, {**point, "tune": None}, where=f"tune.space at {in_words(point)}")


def baseline(experiment: Experiment) -> Point:
    """The experiment as it is, as a point: its own values of the keys of the space."""
    document = ADAPTER.dump_python(experiment, mode="json")
    return point_of(section_of(experiment).dimensions(), lambda dimension: _value(document, dimension.key))


def _value(document: Any, key: str) -> Any:  # noqa: ANN401 - of any setting
    for name in key.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def in_words(point: Point) -> str:
    """The values of a point: train.temperature=0.02, train.learning_rate=1e-05."""
    return ", ".join(f"{key}={value}" for key, value in point.items()) or "the experiment as it is"


def check_space(experiment: Experiment) -> None:
    """Refuses a sweep in which some trial could not start, before anything is run.

    Every combination of choices and of ends of ranges is read as an experiment of its own; where there are more than
    MOST_CHECKED, each value beside the first ones of the other keys, and MOST_CHECKED that are drawn.

    Raises:
        ConfigError: the sweep cannot be done, a key is unknown or no dimension of a sweep, or a point is refused.
    """
    config = section_of(experiment)
    _check_experiment(experiment)
    dimensions = config.dimensions()
    unknown = [f"tune.space: {why}" for dimension in dimensions if (why := _why_not(dimension.key))]
    if unknown:
        raise ConfigError("\n".join(dict.fromkeys(unknown)))
    if without_keys_within(config.space) != config.space:
        raise ConfigError(
            "tune.space has a URI with keys, which would be written into the run folder; give keys by the environment"
        )
    refused = dict[str, str]()
    for point in points_to_check(dimensions, experiment.seed):
        try:
            with_point(experiment, point)
        except ConfigError as error:
            refused.setdefault(str(error).rpartition(f"{in_words(point)}: ")[2], str(error))
    if refused:
        more = f"\nand {len(refused) - TOLD} more reasons" if len(refused) > TOLD else ""
        hint = "\nchange the values, or give one of two that exclude each other a `when`"
        raise ConfigError("\n".join(list(refused.values())[:TOLD]) + more + hint)


def points_to_check(dimensions: Sequence[Dimension], seed: int) -> Iterable[Point]:
    """Points that stand for all of the space: all combinations of choices and ends, or a part where they are many."""
    some = list(itertools.islice(all_points(dimensions), MOST_CHECKED + 1))
    return some if len(some) <= MOST_CHECKED else _part(dimensions, seed)


def values_alone(dimensions: Sequence[Dimension]) -> Iterator[Point]:
    """Every value of a choice and every end of a range by itself, with what its condition asks for."""
    for dimension in dimensions:
        condition = {key: allowed[0] for key, allowed in dimension.when.items()}
        for value in dimension.ends():
            yield {**condition, dimension.key: value}


def _part(dimensions: Sequence[Dimension], seed: int) -> Iterator[Point]:
    first = next(iter(all_points(dimensions)))
    for point in values_alone(dimensions):
        yield {**first, **point}
    for number in range(MOST_CHECKED):
        yield random_point(dimensions, random.Random(f"{seed}/check").getrandbits(32), number)


def _check_experiment(experiment: Experiment) -> None:
    config = section_of(experiment)
    mine: Any = experiment.mine
    if not config.space:
        raise ConfigError(
            "tune.space is empty; give the settings to try, as in space: {train.temperature: {loguniform: [0.01, 0.1]}}"
        )
    if experiment.train is None:
        raise ConfigError("a sweep trains, and the experiment has no section train; add one (train: {})")
    if experiment.data.evaluation is None:
        raise ConfigError(
            "a sweep compares trials on the dev split of data.evaluation, which is null; set it to a BEIR folder with "
            f"qrels/{experiment.data.dev_split}.tsv"
        )
    if experiment.trains_reranker():
        raise ConfigError(
            f"a sweep compares trials by evaluations during training, which a {experiment.model.family} has none of; "
            "it is of embedders"
        )
    if mine is not None and mine.rounds > 1:
        raise ConfigError(
            f"mine.rounds is {mine.rounds}, and a sweep is of one training; set mine.rounds: 1 for the sweep, and the "
            "rounds in tune/best.yaml"
        )
    if experiment.data.dev_split == experiment.data.evaluation_split:
        raise ConfigError(
            f"data.dev_split and data.evaluation_split are both {experiment.data.dev_split!r}; what was chosen by a "
            "split is not judged by it: name another dev split"
        )


def _why_not(key: str) -> str:
    """Why a key is no dimension of a sweep; empty where it is one."""
    for name, reason in REFUSED.items():
        if key == name or key.startswith(f"{name}."):
            return f"{key} cannot be tried: {reason}"
    known = [*settings(), *filter(None, sections())]
    if key in known or any(key.startswith(f"{name}.") for name in settings()):
        return ""
    meant = nearest(key)
    return f"{key}: unknown key" + (f"; did you mean {meant}?" if meant else "; `rayembed run --help` lists every key")
