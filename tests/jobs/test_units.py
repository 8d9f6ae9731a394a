"""Units survive workers that die, are done once, and fail with their names; with a real Ray."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray.exceptions import RayError

from rayembed.config.ray import RayConfig
from rayembed.jobs.units import Unit, UnitActor, UnitError, Work, run_units

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
    return [Unit(f"unit-{i}", i, {"does": what, "writes": "x" * i}, f"row {i} of them") for i, what in enumerate(does)]


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
    assert "unit-1 (row 1 of them): killed its worker 2 times" in message
    assert "unit-2 (row 2 of them): ValueError: unit unit-2 holds nonsense" in message
    assert times_called(tmp_path, [1]) == [2], "tried again ray.max_unit_retries times and no more"
    before = times_called(tmp_path, [0, 3])

    counts = run_units(units("well", "well", "well", "well"), work(tmp_path), RETRIES)
    assert counts == [{"letters": i} for i in range(4)]
    assert times_called(tmp_path, [0, 3]) == before


def test_an_actor_that_somebody_kills_while_it_works_is_replaced(tmp_path: Path) -> None:
    calls = tmp_path / "calls" / "unit-2"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not (calls.is_file() and calls.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(int(calls.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    does = ("well", "well", "hang once", "well", "well")
    counts = run_units(units(*does), work(tmp_path), RayConfig(num_workers=2, max_unit_retries=1))
    killer.join()
    assert counts == [{"letters": i} for i in range(5)]
    assert times_called(tmp_path, range(5)) == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_actors_that_are_gone_for_good_are_replaced(tmp_path: Path, num_workers: int) -> None:
    """`ray.kill` leaves an actor that does not come back: what was lost with it goes to another."""
    does = ("ray.kill once", "well", "ray.kill once", "well")
    counts = run_units(units(*does), work(tmp_path), RayConfig(num_workers=num_workers, max_unit_retries=2))
    assert counts == [{"letters": i} for i in range(4)]
    assert times_called(tmp_path, [0, 2]) == [2, 2]
    assert max(times_called(tmp_path, [1, 3])) <= num_workers, "at most what the other actor was doing is done again"


def test_a_unit_that_loses_its_actor_for_good_more_often_than_allowed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match=r"1 of 2 units failed(.|\n)*unit-0 \(row 0 of them\): killed its") as failed:
        run_units(units("ray.kill once", "well"), work(tmp_path), RayConfig(max_unit_retries=0))
    assert "unit-1" not in str(failed.value)
    assert run_units(units("ray.kill once", "well"), work(tmp_path), RETRIES) == [{"letters": 0}, {"letters": 1}]
    assert times_called(tmp_path, [0, 1]) == [2, 1], "what was done is kept"


def test_pools_that_bring_nothing_are_not_made_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def lost(left: Sequence[Unit], *_: object) -> list[dict[str, str]]:
        made.append([unit.name for unit in left])
        if len(made) == 2:
            return [{"mark": str(tmp_path / "done" / "unit-1.json"), "error": "is no good"}]
        raise RayError("no node is left")

    monkeypatch.setattr("rayembed.jobs.units._stream", lost)
    with pytest.raises(UnitError, match=r"2 of 2 units failed(.|\n)*no node is left(.|\n)*is no good"):
        run_units(units("well", "well"), work(tmp_path), RETRIES)
    assert made == [["unit-0", "unit-1"], ["unit-0", "unit-1"], *[["unit-0"]] * 3], "counted anew after each that helps"


def test_all_units_that_failed_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnitError) as failed:
        run_units(units(*["raise"] * 7, "well"), work(tmp_path), RETRIES)
    message = str(failed.value)
    assert "7 of 8 units failed" in message
    assert "and 2 more: unit-5 (row 5 of them), unit-6 (row 6 of them)" in message
    assert times_called(tmp_path, range(7)) == [1] * 7, "an error of ours is the same every time"


def test_the_end_says_how_long_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "rayembed"):
        run_units(units("well", "sleep", "well"), work(tmp_path), RETRIES)
    took = time.monotonic() - start
    (line,) = [record.message for record in caplog.records if " took " in record.message]
    assert line.startswith("break things: 3 units of 3 letters took ")
    assert line.endswith(" letters/s; the longest unit 1 s)")
    assert 3 / took - 0.05 <= float(line.split("(")[1].split()[0]) <= 3 / 1.2 + 0.05, "as rounded to a tenth"
    records = [json.loads((tmp_path / "done" / f"unit-{i}.json").read_text()) for i in range(3)]
    assert [record["letters"] for record in records] == [0, 1, 2]
    assert records[0]["seconds"] < 1.2 <= records[1]["seconds"] < took


def test_a_worker_that_cannot_be_made_ends_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match="OSError: the model is not there"):
        run_units(units("well", "well"), work(tmp_path, "the model is not there"), RETRIES)
    assert not (tmp_path / "calls").exists()


def test_a_worker_that_is_killed_whenever_it_is_made_ends_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match="was killed again and again while it was made"):
        run_units(units("well", "well"), work(tmp_path, "die"), RETRIES)


def test_a_unit_that_is_sent_again_after_it_was_done_is_left_as_it_is(tmp_path: Path) -> None:
    actor = UnitActor(
        worker="tests.jobs.breaking_units:Breaking",
        arguments={"constructor": ""},
        folder=str(tmp_path),
        threads=1,
        use_gpu=False,
        max_retries=0,
        num_workers=1,
    )
    mark = str(tmp_path / "done" / "unit-1.json")
    batch = {"mark": [mark], "spec": [json.dumps({"does": "well", "writes": "x"})]}
    assert actor(batch) == actor(batch) == {"mark": [mark], "error": [""]}
    assert times_called(tmp_path, [1]) == [1]


def test_what_is_done_needs_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_units(units("well"), work(tmp_path), RETRIES)
    monkeypatch.setattr("rayembed.jobs.units._stream", lambda *_: pytest.fail("a worker was started"))
    assert run_units(units("well"), work(tmp_path), RETRIES) == [{"letters": 0}]
