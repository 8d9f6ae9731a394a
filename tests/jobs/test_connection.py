"""Which Ray is taken, how large a local one is, and what is said where none answers or it is too small."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from rayembed.config.ray import RayConfig
from rayembed.jobs import connection
from rayembed.jobs.connection import address_of, await_room, connect, lack_of_room, on_token, start_local


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        (None, None, "local"),
        (None, "", "local"),
        (None, "head:6379", "head:6379"),
        (None, "auto", "auto"),
        ("auto", None, "auto"),
        ("auto", "head:6379", "head:6379"),
        ("local", "head:6379", "local"),
        ("other:1", "head:6379", "other:1"),
    ],
)
def test_address(setting: str | None, environment: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert address_of(RayConfig(address=setting)) == expected
    assert connection.on_this_machine(RayConfig(address=setting)) == (expected == "local")


def test_an_address_of_the_environment_is_checked_like_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match=r"RAY_ADDRESS: 'http://127.0.0.1:8265' is of the dashboard.*; or unset"):
        address_of(RayConfig())
    assert address_of(RayConfig(address="local")) == "local"


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of ray.init, and what of the environment it saw; nothing is started."""
    seen: list[dict[str, Any]] = []

    def init(**arguments: object) -> SimpleNamespace:
        level = logging.getLogger("ray._private.authentication.authentication_token_setup").getEffectiveLevel()
        seen.append({**arguments, "RAY_ADDRESS": os.environ.get("RAY_ADDRESS"), "level": level})
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr("ray.init", init)
    return seen


def test_a_local_ray_is_as_large_as_the_machine_and_knows_of_no_cluster(
    inits: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "cpu_count", lambda: 3)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert start_local(RayConfig(num_workers=3)) == "127.0.0.1:8265"
    assert [(seen["address"], seen["num_cpus"], seen["RAY_ADDRESS"]) for seen in inits] == [("local", 3, None)]
    assert inits[0]["include_dashboard"] is True
    assert inits[0]["level"] == logging.ERROR
    assert os.environ["RAY_ADDRESS"] == "head:6379"
    with pytest.raises(ValueError, match=r"ray\.num_workers 2 x ray\.cpus_per_worker 2 asks for 4 CPU .* has 3 "):
        start_local(RayConfig(num_workers=(2, 9), cpus_per_worker=2, max_failures=1))
    assert len(inits) == 1


def test_cores_are_those_of_this_process_alone() -> None:
    """By its affinity, in a process of its own; Ray itself counts all cores of the machine."""
    code = (
        "import os; os.sched_setaffinity(0, {0})\nfrom types import SimpleNamespace\nimport ray\n"
        "ray.init = lambda **told: print(told['num_cpus']) or SimpleNamespace(dashboard_url='')\n"
        "from rayembed.config.ray import RayConfig\nfrom rayembed.jobs.connection import start_local\n"
        "start_local(RayConfig())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "1\n"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_nothing_answers(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a port that nobody listens at, by the setting and by the environment, and at a host that there is not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"no Ray answers at .*:{free_port} .*is that of ray.address"):
        connect(f"127.0.0.1:{free_port}")
    monkeypatch.setenv("RAY_ADDRESS", f"localhost:{free_port}")
    with pytest.raises(ConnectionError, match=r"that of RAY_ADDRESS: start one there \(ray start --head --port"):
        connect(f"localhost:{free_port}")
    with pytest.raises(ConnectionError, match=r"no Ray answers at no-such-machine\.invalid:6379"):
        connect("no-such-machine.invalid:6379")
    assert time.monotonic() - start < 15


@pytest.fixture
def listening(free_port: int) -> Iterator[int]:
    """A port that somebody listens at who is no Ray."""
    with socket.socket() as taken:
        taken.bind(("", free_port))
        taken.listen()
        yield free_port


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (AuthenticationError("no token"), None, "refuses this process: it wants a token"),
        (ConnectionError("Failed"), RuntimeError("... ray.exceptions.AuthenticationError: no"), "refuses this process"),
        (
            ConnectionError("Failed"),
            RuntimeError("Traceback\n  many lines\nRpcError: timed out"),
            "1: RpcError: timed out",
        ),
        (RuntimeError("Version mismatch"), None, "Version mismatch; the address is that of ray.address"),
    ],
)
def test_what_ray_raises_is_said_in_a_line(
    error: Exception, cause: Exception | None, expected: str, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        assert os.environ["RAY_gcs_server_port_wait_time_s"] == "3", "Ray tries for 20 s otherwise"
        raise error from cause

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(connection.services, "find_node_ids", lambda: {"n"})
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    address = f"127.0.0.1:{listening}"
    with pytest.raises(ConnectionError) as raised:
        connect(address)
    assert expected.replace("1: Rpc", f"{listening}: Rpc") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "RAY_gcs_server_port_wait_time_s" not in os.environ


def test_a_machine_that_is_no_node_is_told_to_submit(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.services, "find_node_ids", set)
    with pytest.raises(ConnectionError, match=r"this machine is no node of it.*submit the command \(ray job submit"):
        connect(f"127.0.0.1:{listening}")


def test_auto_without_a_ray_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
    with pytest.raises(ConnectionError, match=r"ray.address is auto, and no Ray runs on this machine; start one"):
        connect("auto")


@pytest.mark.parametrize(
    ("environment", "home", "expected"),
    [
        ({}, False, "it wants a token, and RAY_AUTH_MODE is not set; set RAY_AUTH_MODE=token and put"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "RAY_AUTH_MODE is disabled; set RAY_AUTH_MODE=token"),
        (
            {"RAY_AUTH_MODE": "token"},
            False,
            "none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "SECRET"}, True, "the token of RAY_AUTH_TOKEN is not the"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t"}, True, "the token of RAY_AUTH_TOKEN_PATH /t is not"),
        ({"RAY_AUTH_MODE": "token"}, True, ".ray/auth_token is not the cluster's"),
    ],
)
def test_what_is_wrong_with_the_token(
    environment: dict[str, str], home: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if home:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("SECRET")
    told = on_token()
    assert expected in told
    assert "SECRET" not in told
    assert ("set RAY_AUTH_MODE=token" in told) == (environment.get("RAY_AUTH_MODE") != "token")


def node(cpus: float, gpus: float = 0, **labels: str) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": labels}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that sleeping moves; gives the lengths of the sleeps."""
    slept: list[float] = []
    monkeypatch.setattr(connection.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(connection.time, "sleep", slept.append)
    return iter([slept])


def test_too_small_a_cluster_is_refused_when_no_nodes_come(
    monkeypatch: pytest.MonkeyPatch, clock: Iterator[list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    (slept,) = clock
    monkeypatch.setattr(connection, "alive_nodes", lambda: [node(4), node(2, 1)])
    with caplog.at_level(logging.INFO, "rayembed"):
        with pytest.raises(ValueError, match=r"for 3 workers of 2 CPU cores and a GPU .* has room for 1 \(2 nodes"):
            await_room(RayConfig(num_workers=3, cpus_per_worker=2, use_gpu=True))
    assert 30 <= sum(slept) <= 32
    assert sum("nodes that may be joining" in record.message for record in caplog.records) == 1


def test_nodes_that_join_are_waited_for(monkeypatch: pytest.MonkeyPatch, clock: Iterator[list[float]]) -> None:
    (slept,) = clock
    monkeypatch.setattr(connection, "alive_nodes", lambda: [node(1)] * (1 + (sum(slept) > 4)))
    await_room(RayConfig(num_workers=2))
    assert sum(slept) == 5


def test_what_an_autoscaler_is_waited_for_is_told_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes, told = [node(0, **{"ray.io/node-group": "head"})], threading.Event()

    def sleep(seconds: float) -> None:
        assert seconds == connection.TOLD_EVERY_S == 30
        if len([record for record in caplog.records if "waiting for the autoscaler" in record.message]) == 2:
            nodes.append(node(2))
            told.set()

    monkeypatch.setattr(connection, "alive_nodes", lambda: nodes)
    monkeypatch.setattr(connection.time, "sleep", sleep)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
    with caplog.at_level(logging.INFO, "rayembed"):
        await_room(RayConfig(num_workers=2))
        assert told.wait(10)
    assert lack_of_room(RayConfig(num_workers=2)) == ""
