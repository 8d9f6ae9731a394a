"""A Ray of several nodes on this machine, in a process of its own, whose nodes tests may take away.

Ray wants its nodes added from a main thread, and writes which cluster is the current one into RAY_TMPDIR, where other
Rays of this user would find it: hence the process, and the folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


class Nodes:
    """A head node without CPUs, and worker nodes of one CPU each."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process, self.pid = process, process.pid
        self.address = self._answer()

    def remove(self) -> None:
        """Kills the processes of the worker node that was added last, as a machine that loses its power."""
        self._tell("remove")

    def add(self) -> None:
        """Adds a worker node."""
        self._tell("add")

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        assert self._answer() == word

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.split()[1]
        raise RuntimeError(f"the cluster ended with status {self._process.wait()}")


def actors_below(pid: int) -> list[psutil.Process]:
    """Of the descendants of a process those that do units of work, or are about to."""
    return [process for process in psutil.Process(pid).children(recursive=True) if "MapWorker" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def cluster(num_nodes: int, *, scratch: Path | None = None) -> Iterator[Nodes]:
    """Nodes that live as long as the block.

    Args:
        num_nodes: worker nodes.
        scratch: each worker node has a folder of its own in it for RAYEMBED_SCRATCH. None: that of this process.
    """
    temporary = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # paths of sockets must be short
    (temporary / "ray").mkdir()
    environment = {**os.environ, "RAY_TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "tests.jobs.cluster", str(num_nodes), *([] if scratch is None else [str(scratch)])]
    with (temporary / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        yield Nodes(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # it ends by itself
        try:
            process.wait(30)
        finally:
            process.kill()
            shutil.rmtree(temporary, ignore_errors=True)


def serve(num_nodes: int, scratch: str | None = None) -> None:
    """Makes the nodes, says their address, and does what standard input says until it ends."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = []
    for number in range(num_nodes):
        own = {} if scratch is None else {"env_vars": {"RAYEMBED_SCRATCH": f"{scratch}/{number}"}}
        workers.append(made.add_node(num_cpus=1, **own))
    _say(made.address)
    for line in sys.stdin:
        if line.strip() == "remove":
            made.remove_node(workers.pop(), allow_graceful=False)
        else:
            workers.append(made.add_node(num_cpus=1))
        _say(line)
    made.shutdown()


def _say(word: str) -> None:
    sys.stdout.write(f"answer {word.strip()}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[2:])
