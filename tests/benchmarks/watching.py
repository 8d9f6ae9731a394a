"""Runs a command and watches what every process of its tree holds in memory; nothing here knows what the command does.

Ray's raylet, gcs and workers descend from the driver where the driver started Ray, so the tree is the whole run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EVERY_SECONDS = 0.2
ORPHANS_SECONDS = 30  # Ray's processes notice by themselves that their driver was killed
MEBIBYTE = 1 << 20
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
KINDS = {"raylet": "raylet", "gcs_server": "gcs"}  # by the name of the program
SERVICES = {"dashboard", "agent", "monitor", "log_monitor", "main"}  # scripts that Ray starts beside


@dataclass
class Peak:
    """The most that one process of a kind held at a sample, in bytes.

    RSS counts pages of files and of shared memory that the process has mapped, which others may hold too and the
    kernel may take back; private is RSS without them.
    """

    rss: int = 0
    private: int = 0
    pids: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Watched:
    """How a command went."""

    status: int
    """Exit status; below 0: the signal that ended it."""

    seconds: float
    peaks: dict[str, Peak]
    """By kind of process."""

    lines: list[tuple[float, str]]
    """What it wrote, each line with the seconds after the start (to EVERY_SECONDS)."""

    @property
    def largest(self) -> tuple[str, Peak]:
        """Kind and peak of the process that held most."""
        return max(self.peaks.items(), key=lambda item: item[1].rss)


def watch(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> Watched:
    """Runs a command to its end.

    Args:
        command: program and words.
        log: file that takes what it writes.
        environment: variables beside those of this process.
        kill_when: asked every EVERY_SECONDS; once true, the command gets SIGKILL. None: it is left alone.
    """
    start, lines = time.monotonic(), _Lines(log)
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    variables.pop("RAY_ADDRESS", None)
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=variables)
    tree, seconds = _Tree(process.pid), 0.0
    while process.poll() is None:
        tree.sample()
        seconds = time.monotonic() - start
        lines.read(seconds)
        if kill_when is not None and kill_when():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(EVERY_SECONDS)
    status = process.wait()
    seconds = time.monotonic() - start
    tree.end()
    lines.read(seconds)
    return Watched(status, seconds, tree.peaks, lines.found)


def checked(watched: Watched, log: Path) -> Watched:
    """The same, if the command went well; else this process ends and shows the last lines."""
    if watched.status != 0:
        last = "\n".join(line for _, line in watched.lines[-30:])
        sys.exit(f"{last}\nthe command ended with status {watched.status}; all of its log: {log}")
    return watched


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def memory_table(watched: Watched) -> str:
    """Peaks by kind, the largest first."""
    peaks = sorted(watched.peaks.items(), key=lambda item: -item[1].rss)
    rows = [(kind, len(peak.pids), megabytes(peak.rss), megabytes(peak.private)) for kind, peak in peaks]
    return markdown(("process", "seen", "peak RSS of the largest", "of it private"), rows)


def megabytes(number: int) -> str:
    """Bytes in words."""
    return f"{number / MEBIBYTE:,.0f} MiB"


class _Lines:
    """Lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._rest = path, 0, b""
        self.found: list[tuple[float, str]] = []

    def read(self, seconds: float) -> None:
        """Takes the whole lines that are new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        self.found += [(seconds, line.decode(errors="replace")) for line in whole]


class _Tree:
    """A process and all that descend from it, also those whose parent has ended."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._known: dict[int, psutil.Process] = {}
        self._kinds: dict[int, str] = {}
        self.peaks: dict[str, Peak] = {}

    def sample(self) -> None:
        """Looks at every process once."""
        try:
            root = psutil.Process(self._root)
            for process in (root, *root.children(recursive=True)):
                self._known.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        for pid, process in list(self._known.items()):
            try:
                memory, kind = process.memory_info(), self._kind(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                del self._known[pid]
                continue
            peak = self.peaks.setdefault(kind, Peak())
            peak.rss = max(peak.rss, memory.rss)
            peak.private = max(peak.private, memory.rss - memory.shared)
            peak.pids.add(pid)

    def end(self) -> None:
        """Waits for those that are left, and ends those that stay."""
        deadline = time.monotonic() + ORPHANS_SECONDS
        while self._left() and time.monotonic() < deadline:
            time.sleep(EVERY_SECONDS)
        for process in self._left():
            process.kill()

    def _left(self) -> list[psutil.Process]:
        return [p for p in self._known.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def _kind(self, process: psutil.Process) -> str:
        if process.pid == self._root:
            return "driver"
        words = process.cmdline()
        title = words[0] if words else ""
        if title.startswith("ray::"):
            name = title.removeprefix("ray::").split(".")[0].split()[0]
            if name != "IDLE" or process.pid not in self._kinds:
                self._kinds[process.pid] = f"Ray worker {name}"  # a worker that rests again keeps what it did
            return self._kinds[process.pid]
        if SERVICES & {Path(word).stem for word in words if word.endswith(".py")} or "ray-dashboard" in title:
            return "Ray services"
        return KINDS.get(process.name(), "other")
