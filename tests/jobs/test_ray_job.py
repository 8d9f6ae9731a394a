"""The same command through `ray job submit`, on a cluster of one machine that is started for it."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayembed.config.loading import dump
from tests.jobs.conftest import MakeExperiment
from tests.jobs.started_nodes import BIN, free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster(ray_environment: None) -> Iterator[str]:
    """Address of the dashboard of a head node, in a process group of its own that ends with the test."""
    temporary = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # paths of sockets must be short
    port, dashboard, client, agent, metrics = free_ports(5)
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--temp-dir={temporary}",
        f"--port={port}",
    ]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    # The agent that starts jobs has a fixed port otherwise, which the Ray of the other tests holds.
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    with (temporary / "head.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_it_answers(address, head, temporary / "head.log")
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_it_answers(address: str, head: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=2):
                return
        except OSError:
            time.sleep(0.3)


def test_run_as_a_submitted_job(cluster: str, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    experiment = make_experiment(tmp_path / "run", evaluate={"k_values": [10]})
    (sources / "experiment.yaml").write_text(dump(experiment))
    submit = [str(BIN / "ray"), "job", "submit", "--address", cluster, "--working-dir", str(sources)]
    deadline = time.monotonic() + 60
    while True:
        job = subprocess.run(
            [*submit, "--", str(BIN / "rayembed"), "run", "experiment.yaml"],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        # The dashboard answers some seconds before the agent that starts jobs is there, or hangs up on who asks for it.
        starting = any(words in job.stdout + job.stderr for words in ("No available agent", "Connection aborted"))
        if not starting or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert job.returncode == 0, job.stdout + job.stderr
    assert (tmp_path / "run" / "evaluate" / "metrics.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
