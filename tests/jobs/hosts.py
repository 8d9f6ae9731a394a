"""A Ray on several hosts of this machine: each has a network of its own, an address, and a /tmp/ray that no other sees.

Network and mount namespaces make them (root and iproute2 are needed), joined by a bridge; the other files are shared,
as on a cluster with NFS. A host can be killed with all its processes, or cut off with its processes alive.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
PORT = 6379
QUICK_HEALTH = {  # a host that is cut off is given up within some 10 s, not after a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


class Host:
    """One host; the first of a cluster is its head."""

    def __init__(self, number: int, bridge: str, folder: Path) -> None:
        """Makes its network and its own /tmp/ray."""
        self.address = f"10.77.{os.getpid() % 250}.{number + 1}"
        self._name, self._folder = f"{bridge}h{number}", folder / f"host{number}"
        self._folder.mkdir(parents=True)
        inner = f"{self._name}i"
        for words in (
            f"ip netns add {self._name}",
            f"ip link add {self._name} type veth peer name {inner}",
            f"ip link set {inner} netns {self._name}",
            f"ip link set {self._name} master {bridge} up",
            f"ip -n {self._name} addr add {self.address}/24 dev {inner}",
            f"ip -n {self._name} link set {inner} up",
            f"ip -n {self._name} link set lo up",
        ):
            _run(words)
        Path("/tmp/ray").mkdir(exist_ok=True)
        # The process that holds the mount, which all others of this host join.
        mount = f"mount --make-rprivate / && mount --bind {self._folder} /tmp/ray && exec sleep infinity"
        self._holder = self._popen(["ip", "netns", "exec", self._name, "unshare", "-m", "sh", "-c", mount])
        deadline = time.monotonic() + 10
        while "sleep" not in Path(f"/proc/{self._holder.pid}/cmdline").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self._ray: subprocess.Popen[bytes] | None = None

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """The same command on this host."""
        # not `ip netns exec`, which makes a mount namespace of its own
        return ["nsenter", "-t", str(self._holder.pid), "-n", "-m", f"--wd={os.getcwd()}", *map(str, words)]

    def start_ray(self, head: str | None, *, cpus: int) -> None:
        """Starts Ray's node; `head` is None on the head."""
        words: list[str | Path] = [BIN / "ray", "start", "--block", f"--node-ip-address={self.address}"]
        words += ["--head", f"--port={PORT}", "--include-dashboard=true"] if head is None else [f"--address={head}"]
        words += [f"--num-cpus={cpus}", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"]
        self._ray = self._popen(self.command(words))

    def _popen(self, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        variables = {**os.environ, **QUICK_HEALTH}
        variables.pop("RAY_ADDRESS", None)
        with (self._folder.parent / f"{self._folder.name}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True)

    def log(self) -> str:
        """What Ray's processes on this host said."""
        return (self._folder.parent / f"{self._folder.name}.log").read_text()

    def cut_off(self) -> None:
        """Its cable is pulled; its processes live."""
        _run(f"ip link set {self._name} down")

    def kill(self) -> None:
        """All its processes end at once, and it answers nobody."""
        self.cut_off()
        self.end()

    def end(self) -> None:
        """Kills what runs on it."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in (self._ray, self._holder):
            if process is not None:
                process.wait(20)

    def processes(self) -> list[int]:
        """Their ids."""
        return [int(line) for line in _run(f"ip netns pids {self._name}").split()]

    def remove(self) -> None:
        """Takes its network away."""
        subprocess.run(["ip", "link", "del", self._name], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self._name], check=False, capture_output=True)


class Hosts:
    """A head without CPUs on which drivers run, and workers of one CPU each."""

    def __init__(self, head: Host, workers: list[Host]) -> None:
        self.head, self.workers = head, workers
        self.address = f"{head.address}:{PORT}"

    def start(self, words: Sequence[str | Path], log: Path, **variables: str) -> "subprocess.Popen[bytes]":
        """Starts a driver on the head."""
        environment = {**os.environ, "RAY_ADDRESS": self.address, **variables}
        with log.open("wb") as output:
            return subprocess.Popen(self.head.command(words), stdout=output, stderr=subprocess.STDOUT, env=environment)


@contextmanager
def hosts(num_workers: int, variables: Mapping[str, str] | None = None) -> Iterator[Hosts]:
    """Hosts that live as long as the block; `variables` are set for Ray's nodes."""
    bridge, folder = f"rb{os.getpid() % 10000}", Path(tempfile.mkdtemp(prefix="hosts", dir="/tmp"))
    made: list[Host] = []
    before = {name: os.environ.get(name) for name in variables or {}}
    os.environ.update(variables or {})
    try:
        _run(f"ip link add {bridge} type bridge")
        _run(f"ip link set {bridge} up")
        made.extend(Host(number, bridge, folder) for number in range(num_workers + 1))
        found = Hosts(made[0], made[1:])
        made[0].start_ray(None, cpus=0)
        for worker in found.workers:
            worker.start_ray(found.address, cpus=1)
        _wait_for_nodes(found, num_workers + 1)
        yield found
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for host in made:
            host.end()
            host.remove()
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_nodes(found: Hosts, number: int) -> None:
    ask = (
        "import ray, sys; ray.init(address='auto', log_to_driver=False, logging_level='ERROR'); "
        f"sys.exit(sum(node['Alive'] for node in ray.nodes()) < {number})"
    )
    deadline = time.monotonic() + 120
    environment = {**os.environ, "RAY_ADDRESS": found.address}
    while subprocess.run(
        found.head.command([sys.executable, "-c", ask]), env=environment, capture_output=True, check=False, timeout=60
    ).returncode:
        assert time.monotonic() < deadline, "\n".join(host.log() for host in (found.head, *found.workers))
        time.sleep(0.5)


def _run(words: str) -> str:
    done = subprocess.run(words.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout
