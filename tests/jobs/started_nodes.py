"""A cluster of `ray start`: a head and workers of this machine, with a token, each in a process group of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Cluster:
    """Nodes that were started."""

    folder: Path
    """Ray's own files, logs among them."""

    token: str
    address: str
    dashboard: str
    environment: dict[str, str]
    """Of a process that is to be let in."""

    nodes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start(self, *words: str, before: Sequence[str] = ()) -> None:
        """Starts a node by `ray start`; `before` are words of a command that starts it in its turn."""
        agent, metrics = free_ports(2)  # fixed ones otherwise, which other Rays of this machine hold
        ports = [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command = [*before, str(BIN / "ray"), "start", "--block", *words, *ports]
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        self.nodes.append(node)
        deadline, told = time.monotonic() + 120, self.folder / f"node-{len(self.nodes) - 1}.log"
        while "Ray runtime started" not in told.read_text():
            assert node.poll() is None, told.read_text()
            assert time.monotonic() < deadline, told.read_text()
            time.sleep(0.2)

    def add_worker(self, *, before: Sequence[str] = ()) -> None:
        """Adds a node of one CPU, with files of its own as a machine has them.

        In the head's folder Ray would remove the submitted working directory when one of the nodes is done with it.
        """
        own = self.folder / f"w{len(self.nodes)}"
        self.start(f"--address={self.address}", "--num-cpus=1", f"--temp-dir={own}", before=before)

    def remove_worker(self) -> None:
        """Ends the node that was added last."""
        _end(self.nodes.pop())

    def run(self, *words: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """A command, let in by the token where `environment` does not say otherwise."""
        given = {**self.environment, **environment}
        return subprocess.run(words, capture_output=True, text=True, env=given, timeout=400, check=False)

    def submit(self, sources: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """`ray job submit`, followed to its end."""
        submit = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--working-dir", sources, "--", *words]
        deadline = time.monotonic() + 60
        while True:
            ended = self.run(*submit, **environment)
            # The dashboard answers some seconds before the agent that starts jobs is there, or hangs up on who asks.
            told = ended.stdout + ended.stderr
            if not any(words in told for words in ("No available agent", "Connection aborted", "Connection refused")):
                return ended
            assert time.monotonic() < deadline, told
            time.sleep(1)


@contextmanager
def started_nodes(workers: int) -> Iterator[Cluster]:
    """A head without CPUs and workers of one CPU each, for the length of the block."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # paths of sockets must be short
    secret = Path(tempfile.mkdtemp(prefix="s", dir="/tmp")) / "token"
    token = "pLaNtEd" + os.urandom(16).hex()
    secret.write_text(token)
    port, dashboard, client = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret), "RAY_TMPDIR": str(folder)}
    made = Cluster(folder, token, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    try:
        head = (f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--num-cpus=0")
        made.start("--head", f"--temp-dir={folder / 'ray'}", *head)
        _await_answer(made)
        for _ in range(workers):
            made.add_worker()
        yield made
    finally:
        for node in reversed(made.nodes):
            _end(node)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(secret.parent, ignore_errors=True)


def _end(node: "subprocess.Popen[bytes]") -> None:
    os.killpg(node.pid, signal.SIGTERM)
    try:
        node.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def _await_answer(made: Cluster) -> None:
    deadline = time.monotonic() + 90
    log = made.folder / "node-0.log"
    while True:
        assert made.nodes[0].poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"{made.dashboard}/api/version", timeout=2):
                return
        except urllib.error.HTTPError:  # it wants the token
            return
        except OSError:
            time.sleep(0.3)
