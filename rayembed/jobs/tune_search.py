"""Which point a sweep tries next: a function of the space, the seed and the trials before, for every kind of search.

Optuna is asked directly: Ray's OptunaSearch takes the last figure of a trial for its result, fails on reports without
the metric (those of checkpoints), and cannot be told earlier trials of a space with conditions. The study is built anew
for each question, from the trials as they are on disk, so that nothing has to be kept for a sweep to go on.
"""

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal

from rayembed.config.space import Dimension, Point, all_points, point_of, random_point, rounded
from rayembed.jobs.tune_trials import Result, Trial, name_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

IN_VAIN = 200  # draws of points that were tried already, before a space counts as exhausted
STARTUP = 5  # random trials before Optuna's TPE chooses; its default of 10 would be all of a small sweep
Search = Callable[[Sequence[Dimension], int, Sequence[Trial]], Point | None]


def next_point(
    search: Literal["random", "grid", "optuna"],
    dimensions: Sequence[Dimension],
    *,
    seed: int,
    known: Sequence[Trial],
) -> Point | None:
    """A point that was not tried yet; None where there is none left (or none was found in IN_VAIN draws).

    Args:
        search: kind of tune.search.
        dimensions: of the space.
        seed: of the experiment.
        known: all trials that were begun, with the results of those that have ended.
    """
    return SEARCHES[search](dimensions, seed, known)


def _by_chance(dimensions: Sequence[Dimension], seed: int, known: Sequence[Trial]) -> Point | None:
    names = _names(known)
    drawn = (random_point(dimensions, seed, number) for number in islice(count(), len(known) + IN_VAIN))
    return next((point for point in drawn if name_of(point) not in names), None)


def _by_grid(dimensions: Sequence[Dimension], seed: int, known: Sequence[Trial]) -> Point | None:
    names = _names(known)
    return next((point for point in all_points(dimensions) if name_of(point) not in names), None)


def _by_optuna(dimensions: Sequence[Dimension], seed: int, known: Sequence[Trial]) -> Point | None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = _names(known)
    told = [found for trial in known if (found := _told(dimensions, trial)) is not None]
    for attempt in range(IN_VAIN):
        draw = random.Random(f"{seed}/{len(known)}/{attempt}").getrandbits(32)
        sampler = optuna.samplers.TPESampler(seed=draw, n_startup_trials=STARTUP)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(told)
        point = point_of(dimensions, partial(_suggested, study.ask(), dimensions))
        if name_of(point) not in names:
            return point
    return None


SEARCHES: dict[str, Search] = {"random": _by_chance, "grid": _by_grid, "optuna": _by_optuna}


def _names(known: Sequence[Trial]) -> set[str]:
    return {trial.name for trial in known}


def _place(dimensions: Sequence[Dimension], dimension: Dimension) -> str:
    """What Optuna calls a dimension: a key may have several, each with values of its own."""
    return f"{dimension.key} {list(dimensions).index(dimension)}"


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna import distributions

    if dimension.kind == "choice":
        return distributions.CategoricalDistribution([json.dumps(value) for value in dimension.values])
    if dimension.kind == "quniform":
        return distributions.IntDistribution(0, dimension.steps())
    low, high = dimension.values
    if dimension.kind == "randint":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=dimension.kind == "loguniform")


def _suggested(asked: "OptunaTrial", dimensions: Sequence[Dimension], dimension: Dimension) -> Any:  # noqa: ANN401
    name = _place(dimensions, dimension)
    if dimension.kind == "choice":
        return json.loads(asked.suggest_categorical(name, [json.dumps(value) for value in dimension.values]))
    if dimension.kind == "quniform":
        return dimension.nth(asked.suggest_int(name, 0, dimension.steps()))
    low, high = dimension.values
    if dimension.kind == "randint":
        return asked.suggest_int(name, low, high)
    return rounded(asked.suggest_float(name, low, high, log=dimension.kind == "loguniform"), low, high)


def _parameter(dimension: Dimension, value: Any) -> Any:  # noqa: ANN401 - a value of any setting
    """What Optuna calls a value; the other way round than `_suggested`."""
    if dimension.kind == "choice":
        return json.dumps(value)
    return round((value - dimension.values[0]) / dimension.values[2]) if dimension.kind == "quniform" else value


def _told(dimensions: Sequence[Dimension], trial: Trial) -> "FrozenTrial | None":
    """A trial in Optuna's words; None of the experiment as it is, where its values are outside of the space."""
    from optuna.trial import create_trial

    parameters, distributions = {}, {}

    def take(dimension: Dimension) -> Any:  # noqa: ANN401 - a value of any setting
        name, value = _place(dimensions, dimension), trial.values[dimension.key]
        parameters[name], distributions[name] = _parameter(dimension, value), _distribution(dimension)
        return value

    try:
        point_of(dimensions, take)
        return create_trial(params=parameters, distributions=distributions, **_outcome(trial.result))
    except (KeyError, TypeError, ValueError):
        if not trial.baseline:
            raise
        return None


def _outcome(result: Result | None) -> dict[str, Any]:
    """State and figures of a trial in Optuna's words."""
    from optuna.trial import TrialState

    if result is None:
        return {"state": TrialState.RUNNING}
    if result.status == "failed" or result.best is None:
        return {"state": TrialState.FAIL}
    if result.status == "done":
        return {"state": TrialState.COMPLETE, "value": result.best[1]}
    figures = {step: figure for step, figure in result.evaluations if step > 0}
    return {"state": TrialState.PRUNED, "intermediate_values": figures}
