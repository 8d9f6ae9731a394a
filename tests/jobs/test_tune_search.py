"""Which point comes next: none twice, the same for the same past, and by Optuna near what did well."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest

from rayembed.config.space import Point, parse_space
from rayembed.jobs.tune_search import STARTUP, next_point
from rayembed.jobs.tune_trials import Failure, Result, Trial

RANGES: dict[str, Any] = {"train.a": {"uniform": [-2, 2]}, "train.b": {"loguniform": [1e-4, 1]}}
LISTS: dict[str, Any] = {
    "train.c": {"choice": ["x", "y", None]},
    "train.d": [
        {"quniform": [0, 1, 0.1], "when": {"train.c": "x"}},
        {"randint": [1, 5], "when": {"train.c": "y"}},
    ],
}


def done(number: int, point: Point, figure: float, **changed: Any) -> Trial:  # noqa: ANN401 - of a result
    result = Result(**{"status": "done", "seconds": 1.0, "evaluations": [(0, 0.0), (5, figure)], **changed})
    return Trial(number, point, result=result)


def searched(search: Any, space: dict[str, Any], figure: Any, *, seed: int, number: int) -> list[Trial]:  # noqa: ANN401
    known: list[Trial] = []
    for place in range(number):
        point = next_point(search, parse_space(space), seed=seed, known=known)
        assert point is not None
        known.append(done(place, point, figure(point)))
    return known


def valley(point: Point) -> float:
    return float(-((point["train.a"] - 1) ** 2) - (math.log10(point["train.b"]) + 2) ** 2)


@pytest.mark.parametrize("search", ["random", "grid", "optuna"])
def test_every_point_of_a_finite_space_comes_once_and_then_none(search: Any) -> None:  # noqa: ANN401
    space = {"train.c": {"choice": ["x", [1], None]}, "train.e": {"choice": [True, False], "when": {"train.c": "x"}}}
    known = searched(search, space, lambda _: 0.5, seed=0, number=4)
    points = [trial.values for trial in known]
    assert len({trial.name for trial in known}) == 4
    assert {"train.c": [1]} in points
    assert {"train.c": "x", "train.e": False} in points
    assert next_point(search, parse_space(space), seed=0, known=known) is None


def test_the_grid_comes_in_its_order() -> None:
    space = {"train.c": {"choice": [2, 1]}, "train.e": {"choice": [5, 6]}}
    known = searched("grid", space, lambda _: 0.5, seed=0, number=4)
    assert [tuple(trial.values.values()) for trial in known] == [(2, 5), (2, 6), (1, 5), (1, 6)]


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_the_next_point_is_a_function_of_seed_and_past_also_in_another_process(search: str) -> None:
    code = (
        "from tests.jobs.test_tune_search import *\n"
        f"found = searched({search!r}, {{**RANGES, **LISTS}}, lambda point: valley(point), seed=3, number=12)\n"
        "print([trial.values for trial in found])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = searched(search, {**RANGES, **LISTS}, valley, seed=3, number=12)
    assert other.stdout.strip() == str([trial.values for trial in here])
    again = next_point(search, parse_space({**RANGES, **LISTS}), seed=3, known=here[:11])  # type: ignore[arg-type]
    assert again == here[11].values
    assert next_point(search, parse_space({**RANGES, **LISTS}), seed=4, known=here[:11]) != again  # type: ignore[arg-type]


def test_random_points_do_not_depend_on_what_came_of_others() -> None:
    first = searched("random", RANGES, valley, seed=1, number=6)
    second = searched("random", RANGES, lambda _: 0.0, seed=1, number=6)
    assert [trial.values for trial in first] == [trial.values for trial in second]


def test_optuna_finds_better_points_than_chance_and_draws_the_first_at_random() -> None:
    best: dict[str, list[float]] = {"random": [], "optuna": []}
    for search, found in best.items():
        for seed in range(4):
            known = searched(search, RANGES, valley, seed=seed, number=25)
            found.append(max(valley(trial.values) for trial in known))
            early = searched(search, RANGES, lambda _: 0.0, seed=seed, number=STARTUP)
            assert [trial.values for trial in known[:STARTUP]] == [trial.values for trial in early]
    assert sum(best["optuna"]) > sum(best["random"]) + 0.05
    assert sum(best["optuna"]) > -0.4


def test_optuna_is_told_of_every_kind_of_end() -> None:
    """What is running, failed, stopped, or outside of the space is no obstacle; what stopped early counts as worse."""
    space = {**RANGES, **LISTS}
    known = searched("optuna", space, valley, seed=0, number=8)
    failed = Result(status="failed", seconds=1, failure=Failure("nan", again=False))
    nowhere = Trial(11, {"train.a": None, "train.b": 3.0, "train.c": "w"}, baseline=True, result=known[0].result)
    others = [
        Trial(8, {**known[0].values, "train.a": 0.5}),
        Trial(9, {**known[0].values, "train.a": 0.6}, result=failed),
        done(10, {**known[0].values, "train.a": 0.7}, 0.1, status="stopped early"),
        nowhere,
    ]
    assert next_point("optuna", parse_space(space), seed=0, known=[*known, *others]) is not None
    with pytest.raises((KeyError, TypeError, ValueError)):  # another's values must lie in the space
        next_point("optuna", parse_space(space), seed=0, known=[*known, Trial(8, nowhere.values)])


def test_optuna_learns_from_finished_trials_and_from_those_stopped_early() -> None:
    """The same points with the figures turned around lead elsewhere."""
    points = [trial.values for trial in searched("random", RANGES, valley, seed=0, number=20)]
    for status in ("done", "stopped early"):
        found = []
        for sign in (1, -1):
            known = [done(i, point, sign * point["train.a"], status=status) for i, point in enumerate(points)]
            drawn = [next_point("optuna", parse_space(RANGES), seed=seed, known=known) for seed in range(8)]
            found.append(sum(point["train.a"] for point in drawn if point is not None) / 8)
        assert found[0] > found[1] + 0.5, status
