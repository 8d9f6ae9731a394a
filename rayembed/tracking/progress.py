"""The line that a person watches: how far, how fast, when it ends. Plain lines, readable in a job's log too."""

import logging
import time


class Progress:
    """Logs a line at most every few seconds, and one at the end."""

    def __init__(self, what: str, total: int, *, unit: str, done: int = 0, every_seconds: float = 5.0) -> None:
        """Starts the clock.

        Args:
            what: first words of the line.
            total: how many there are.
            unit: of what, in the plural.
            done: how many were done before (a resumed run); they do not count for the rate.
            every_seconds: least time between lines.
        """
        self._what, self._total, self._unit, self._every = what, total, unit, every_seconds
        self._done = self._first = done
        self._told = -1
        self._start = self._last = time.monotonic()
        self._begun: tuple[float, int] | None = None  # when the first were done, and how many then
        self._log = logging.getLogger("rayembed")

    def add(self, count: int, detail: str = "", *, force: bool = False) -> None:
        """Counts what was done, and logs the line if it is time or `force`.

        Args:
            count: how many more.
            detail: words put into the line.
            force: log now.
        """
        self._done += count
        now = time.monotonic()
        self._begun = self._begun or (now, self._done)
        if (force and self._told != self._done) or now - self._last >= self._every:
            self._last, self._told = now, self._done
            self._log.info(self.line(detail))

    def line(self, detail: str = "") -> str:
        """The line as it would be logged now; before the end its rate leaves out the start of workers."""
        now = time.monotonic()
        seconds, since, before = now - self._start, self._start, self._first
        if self._begun is not None and self._begun[1] < self._done < self._total:
            since, before = self._begun
        rate = (self._done - before) / max(now - since, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        share = 100 * self._done / max(self._total, 1)
        parts = [
            f"{self._what} {self._done:,}/{self._total:,} {self._unit} ({share:.0f} %)",
            *([detail] if detail else []),
            f"{rate:,.1f} {self._unit}/s",
            f"{duration(left)} left" if self._done < self._total else f"took {duration(seconds)}",
        ]
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min 05 s, 2 h 10 min; ? when unknown."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
