"""Units survive workers that die, are done once, and fail with their names; with a real Ray."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rayembed.config.ray import RayConfig
from rayembed.jobs.units import Unit, UnitError, Work, run_units

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
RETRIES = RayConfig(max_unit_retries=1)


def work(folder: Path, constructor: str = "") -> Work:
    return Work(
        what="break things",
        counted="letters",
        worker="tests.jobs.breaking_units:Breaking",
        arguments={"constructor": constructor},
        folder=folder,
    )


def units(*does: str) -> list[Unit]:
    return [Unit(f"unit-{i}", i, {"does": what, "writes": "x" * i}) for i, what in enumerate(does)]


def times_called(folder: Path, numbers: Sequence[int]) -> list[int]:
    return [len((folder / "calls" / f"unit-{i}").read_text().splitlines()) for i in numbers]


def test_a_unit_that_kills_its_worker_once_is_done_at_the_second_try(tmp_path: Path) -> None:
    counts = run_units(units("well", "die once", "well", "well"), work(tmp_path), RayConfig(max_unit_retries=2))
    assert counts == [{"letters": i} for i in range(4)], "in the order of the plan"
    assert [(tmp_path / f"unit-{i}.txt").read_text() for i in range(4)] == ["", "x", "xx", "xxx"]
    assert times_called(tmp_path, [1]) == [2]


def test_units_that_fail_are_named_and_the_rest_is_kept_and_not_done_again(tmp_path: Path) -> None:
    with pytest.raises(UnitError) as failed:
        run_units(units("well", "die", "raise", "well"), work(tmp_path), RETRIES)
    message = str(failed.value)
    assert "2 of 4 units failed" in message
    assert "unit-1 (1 letters): killed its worker 2 times" in message
    assert "unit-2 (2 letters): ValueError: unit unit-2 holds nonsense" in message
    assert times_called(tmp_path, [1]) == [2], "tried again ray.max_unit_retries times and no more"
    before = times_called(tmp_path, [0, 3])

    counts = run_units(units("well", "well", "well", "well"), work(tmp_path), RETRIES)
    assert counts == [{"letters": i} for i in range(4)]
    assert times_called(tmp_path, [0, 3]) == before


def test_a_worker_that_cannot_be_made_ends_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match="OSError: the model is not there"):
        run_units(units("well", "well"), work(tmp_path, "the model is not there"), RETRIES)
    assert not (tmp_path / "calls").exists()


def test_a_worker_that_is_killed_whenever_it_is_made_ends_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match="was killed again and again while it was made"):
        run_units(units("well", "well"), work(tmp_path, "die"), RETRIES)


def test_what_is_done_needs_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_units(units("well"), work(tmp_path), RETRIES)
    monkeypatch.setattr("rayembed.jobs.units._stream", lambda *_: pytest.fail("a worker was started"))
    assert run_units(units("well"), work(tmp_path), RETRIES) == [{"letters": 0}]
