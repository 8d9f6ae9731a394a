"""The progress line says how far, how fast and until when; it is logged no more often than asked."""

import logging

import pytest

from rayembed.tracking.progress import Progress, duration


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rayembed.tracking.progress.time.monotonic", clock)
    return clock


def test_the_line_holds_rate_and_time_left(clock: Clock) -> None:
    line = Progress("train", 2000, unit="steps")
    clock.now += 10
    line.add(500)
    assert line.line("loss 0.3") == "train 500/2,000 steps (25 %) | loss 0.3 | 50.0 steps/s | 30 s left"


def test_at_the_end_it_says_how_long_it_took(clock: Clock) -> None:
    line = Progress("encode", 6000, unit="passages")
    clock.now += 90
    line.add(6000)
    assert line.line() == "encode 6,000/6,000 passages (100 %) | 66.7 passages/s | took 1 min 30 s"


def test_what_was_done_before_does_not_count_for_the_rate(clock: Clock) -> None:
    line = Progress("train", 100, unit="steps", done=60)
    clock.now += 5
    line.add(10)
    assert line.line() == "train 70/100 steps (70 %) | 2.0 steps/s | 15 s left"


def test_workers_that_start_do_not_count_for_the_time_left_but_for_that_of_all(clock: Clock) -> None:
    line = Progress("encode", 100, unit="texts")
    clock.now += 40
    line.add(10)
    assert line.line() == "encode 10/100 texts (10 %) | 0.2 texts/s | 6 min 00 s left"
    clock.now += 4
    line.add(20)
    assert line.line() == "encode 30/100 texts (30 %) | 5.0 texts/s | 14 s left"
    clock.now += 14
    line.add(70)
    assert line.line() == "encode 100/100 texts (100 %) | 1.7 texts/s | took 58 s"


def test_before_anything_is_done_the_end_is_unknown(clock: Clock) -> None:
    assert Progress("train", 100, unit="steps").line() == "train 0/100 steps (0 %) | 0.0 steps/s | ? left"
    assert Progress("train", 0, unit="steps").line() == "train 0/0 steps (0 %) | 0.0 steps/s | took 0 s"


def test_lines_are_logged_when_it_is_time_or_asked(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rayembed")
    line = Progress("train", 100, unit="steps", every_seconds=5)
    for _ in range(12):
        clock.now += 1
        line.add(1)
    assert [message.split()[1] for message in caplog.messages] == ["5/100", "10/100"]
    line.add(1, "now", force=True)
    assert caplog.messages[-1].startswith("train 13/100 steps (13 %) | now | ")
    clock.now += 4.9
    line.add(1)
    assert len(caplog.messages) == 3  # a forced line counts for the time between lines


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (45.4, "45 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 00 min"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
