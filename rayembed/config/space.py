"""The space of a sweep: which values of which settings are tried, and under which conditions.

A point is a mapping from dotted keys to values; keys whose condition does not hold are not in it. `point_of` and
`all_points` are the only places that know about conditions: random draws, the grid and Optuna go through them.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = dict[str, Any]
LISTS = ("choice", "grid")
RANGES = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}  # how many numbers each takes
DIGITS = 4  # of a number that is drawn: 0.02374 reads better than 0.023740958, and is as good
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # what PyYAML takes for text


@dataclass(frozen=True)
class Dimension:
    """What one setting may be, where its condition holds."""

    key: str
    kind: str
    """choice, or one of RANGES."""

    values: tuple[Any, ...]
    """Of a choice all of them; of a range its ends, of quniform also the step."""

    when: Mapping[str, tuple[Any, ...]]
    """Values that other keys must have. Empty: always."""

    def holds(self, point: Point) -> bool:
        """Whether the setting is tried in a point that has the keys before it."""
        return all(key in point and point[key] in allowed for key, allowed in self.when.items())

    def ends(self) -> tuple[Any, ...]:
        """All values of a choice, the least and the greatest of a range."""
        if self.kind == "quniform":
            return (self.values[0], self.nth(self.steps()))
        return self.values

    def steps(self) -> int:
        """How often the step of a quniform fits between its ends."""
        low, high, step = self.values
        return int((high - low) / step + 1e-9)

    def nth(self, number: int) -> float | int:
        """A value of a quniform, counted from its lower end."""
        low, _, step = self.values
        value = low + number * step
        return value if isinstance(value, int) else float(f"{value:.12g}")


def parse_space(space: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """The dimensions of tune.space, in its order.

    Raises:
        ValueError: a dimension is not of an allowed form, or its condition can never hold; names the key.
    """
    found: list[Dimension] = []
    for key, given in space.items():
        alternatives = given if isinstance(given, list) else [given]
        if not alternatives:
            raise ValueError(f"{key} has an empty list; give {_FORMS}")
        for number, one in enumerate(alternatives, start=1):
            name = key if len(alternatives) == 1 else f"{key}, entry {number},"
            dimension = _dimension(key, name, one)
            if number < len(alternatives) and not dimension.when:
                raise ValueError(f"{name} has no `when`, so that the entries after it never hold; put it last")
            _check_condition(name, dimension, found)
            found.append(dimension)
    return tuple(found)


def point_of(dimensions: Sequence[Dimension], value_of: Callable[[Dimension], Any]) -> Point:
    """One point: of every key the first dimension whose condition holds, with the value that `value_of` gives it."""
    point: Point = {}
    for dimension in dimensions:
        if dimension.key not in point and dimension.holds(point):
            point[dimension.key] = value_of(dimension)
    return point


def all_points(dimensions: Sequence[Dimension], *, point: Point | None = None) -> Iterator[Point]:
    """Every combination of the choices and of the ends of ranges, the last key fastest."""
    point = point or {}
    if not dimensions:
        yield point
        return
    first, rest = dimensions[0], dimensions[1:]
    if first.key in point or not first.holds(point):
        yield from all_points(rest, point=point)
        return
    for value in first.ends():
        yield from all_points(rest, point={**point, first.key: value})


def random_point(dimensions: Sequence[Dimension], seed: int, number: int) -> Point:
    """The point of a number: a function of the seed, of the number and of the space alone.

    A key's value does not depend on which other keys there are.
    """
    return point_of(dimensions, lambda own: _drawn(own, random.Random(f"{seed}/{number}/{own.key}")))


def rounded(value: float, low: float, high: float) -> float:
    """A number with DIGITS significant digits, and not outside of its range for it."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def _drawn(dimension: Dimension, rng: random.Random) -> Any:  # noqa: ANN401 - of any setting
    if dimension.kind == "choice":
        return dimension.values[rng.randrange(len(dimension.values))]
    if dimension.kind == "quniform":
        return dimension.nth(rng.randint(0, dimension.steps()))
    low, high = dimension.values
    if dimension.kind == "randint":
        return rng.randint(low, high)
    if dimension.kind == "uniform":
        return rounded(low + (high - low) * rng.random(), low, high)
    return rounded(low * (high / low) ** rng.random(), low, high)


_FORMS = (
    "{choice: [...]}, {uniform: [low, high]}, {loguniform: [low, high]}, {quniform: [low, high, step]} or "
    "{randint: [low, high]}"
)


def _dimension(key: str, name: str, given: object) -> Dimension:
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {given!r}, must be {_FORMS}")
    kinds = [word for word in given if word != "when"]
    if len(kinds) != 1 or kinds[0] not in (*LISTS, *RANGES):
        nested = f"; a key is written in one piece, as in {key}.{kinds[0]}" if kinds and "." not in key else ""
        raise ValueError(f"{name} has the keys {', '.join(map(str, given)) or 'none'}, must be {_FORMS}{nested}")
    kind, values = kinds[0], given[kinds[0]]
    if not isinstance(values, list):
        raise ValueError(f"{name}: {kind} is {values!r}, must be a list")
    values = [_number(value) for value in values]
    _check_values(name, kind, values)
    return Dimension(key, "choice" if kind in LISTS else kind, tuple(values), _condition(name, given.get("when")))


def _check_values(name: str, kind: str, values: list[Any]) -> None:
    if kind in LISTS:
        if not values or any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError(f"{name}: {kind} is {values}, must be a list of values, each once")
        return
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != len(values) or len(values) != RANGES[kind] or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}: {kind} is {values}, must be a list of {RANGES[kind]} numbers")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ValueError(f"{name}: randint is {values}, must be two whole numbers; uniform takes others")
    if values[0] >= values[1]:
        raise ValueError(f"{name}: {kind} is {values}; its first number must be below its second")
    if kind == "loguniform" and values[0] <= 0:
        raise ValueError(f"{name}: loguniform is {values}; its numbers must be greater than 0")
    if kind == "quniform" and not 0 < values[2] <= values[1] - values[0]:
        raise ValueError(f"{name}: quniform is {values}; its step must be greater than 0 and fit between the two")


def _condition(name: str, when: object) -> dict[str, tuple[Any, ...]]:
    if when is None:
        return {}
    if not isinstance(when, dict):
        raise ValueError(f"{name}: `when` is {when!r}, must be a mapping from keys of tune.space to a value or a list")
    return {key: tuple(map(_number, value if isinstance(value, list) else [value])) for key, value in when.items()}


def _check_condition(name: str, dimension: Dimension, before: Sequence[Dimension]) -> None:
    for key, allowed in dimension.when.items():
        those = [other for other in before if other.key == key]
        if not those or key == dimension.key:
            raise ValueError(f"{name}: `when` names {key}, which is no key of tune.space before it")
        if any(other.kind != "choice" for other in those):
            raise ValueError(f"{name}: `when` names {key}, which is a range; only a choice can be a condition")
        never = [value for value in allowed if not any(value in other.values for other in those)]
        if never:
            raise ValueError(f"{name}: `when` asks that {key} is {never[0]!r}, which it never is")


def _number(value: Any) -> Any:  # noqa: ANN401 - of any setting
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
