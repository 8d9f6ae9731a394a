"""A Slurm of this machine alone, as far as slurm.sh needs one: an `srun` whose tasks all run here, an `scontrol`.

What it has in common with Slurm: the options, the variables of a step, that a signal to srun reaches all processes of
its tasks, and that a task that fails ends the others. Not: machines of their own, limits, preemption.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"
BIN = Path(sys.executable).parent


class Job:
    """One start of slurm.sh, with what it wrote."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, job_id: int) -> None:
        self.process, self.folder, self.id = process, folder, job_id

    @property
    def token(self) -> Path:
        """Where the job keeps its token while it runs."""
        return self.folder / "tokens" / f"slurm-{self.id}"

    @property
    def temporary(self) -> Path:
        """Ray's folder while it runs."""
        return Path(f"/tmp/rayembed-{self.id}")

    @property
    def log(self) -> str:
        """Everything that it and its machines wrote."""
        return (self.folder / "log").read_text()

    def requeued(self) -> bool:
        """Whether it asked to be queued again."""
        asked = self.folder / "scontrol"
        return asked.is_file() and asked.read_text() == f"requeue {self.id}\n"

    def left(self) -> list[str]:
        """Processes of the job that live on; those of Ray's workers have some seconds to see that Ray has ended."""
        deadline = time.monotonic() + 15
        while found := [process.name() for process in psutil.process_iter() if _job_of(process) == str(self.id)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return found


def _job_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("SLURM_JOB_ID") if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


@contextmanager
def submitted(
    folder: Path,
    words: Sequence[str],
    *,
    machines: int,
    command: str | None = None,
    ray: str | None = None,
) -> Iterator[Job]:
    """Starts slurm.sh as a job's script is started; nothing of it outlives the block.

    Args:
        folder: gets bin/, tokens/, log.
        words: after `sbatch slurm.sh`.
        machines: of the job, one CPU each.
        command: Python that is `rayembed` in this job. None: rayembed itself.
        ray: shell that is `ray` in this job. None: Ray itself.
    """
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "activate").write_text(f"PATH={programs}:{BIN}:$PATH\n")
    _write_program(programs / "srun", f'exec {sys.executable} {__file__} "$@"')
    _write_program(programs / "scontrol", f'echo "$@" >{folder}/scontrol')
    if command is not None:
        (folder / "command.py").write_text(command)
        _write_program(programs / "rayembed", f'exec {sys.executable} {folder}/command.py "$@"')
    if ray is not None:
        _write_program(programs / "ray", ray)
    job_id = os.getpid()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    environment |= {"SLURM_JOB_ID": str(job_id), "SLURM_JOB_NUM_NODES": str(machines), "SLURM_CPUS_PER_TASK": "1"}
    environment |= {"RAYEMBED_VENV": str(folder / "venv"), "RAYEMBED_TOKENS": str(folder / "tokens")}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAYEMBED_LEAVE_S": "30"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", SCRIPT, *words], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    job = Job(process, folder, job_id)
    try:
        yield job
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def srun(arguments: Sequence[str]) -> int:
    """Runs a step's tasks until all have ended, or one has failed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--kill-on-bad-exit"):
        parser.add_argument(option, type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    words = parser.parse_args(arguments)
    assert words.ntasks == words.nodes * words.ntasks_per_node
    tasks = [
        subprocess.Popen(words.command, env={**os.environ, "SLURM_NODEID": str(node)}, start_new_session=True)
        for node in range(words.nodes)
    ]
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    while any(task.poll() is None for task in tasks):
        failed = words.kill_on_bad_exit and any(task.poll() for task in tasks)
        if ending.is_set() or failed:
            _end(tasks)
        time.sleep(0.1)
    return max(abs(task.returncode) for task in tasks)


def _end(tasks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """SIGTERM, and SIGKILL to what is left after KillWait of slurm.conf."""
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while any(task.poll() is None for task in tasks):
        if time.monotonic() > deadline:
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(srun(sys.argv[1:]))
