"""What is asked of a cluster: the fewest workers must have room, and passes over texts use all that there is."""

import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from rayembed import cli
from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.jobs import session

NODES = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}]


@pytest.fixture
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "resources_of_nodes", lambda: NODES)
    monkeypatch.setattr(session, "autoscales", lambda: False)


@pytest.mark.usefixtures("six_cores")
@pytest.mark.parametrize(
    ("workers", "cpus", "use_gpu", "expected"),
    [
        ((1, 4), 1, False, 4),
        ((1, 9), 1, False, 6),
        ((1, 4), 2, False, 3),
        ((1, 4), 3, False, 1),  # six cores hold two such workers, but no second node has three
        ((1, 4), 1, True, 2),
        ((1, 4), 4, True, 1),
        ((3, 4), 4, False, 3),
        (9, 1, False, 9),
    ],
)
def test_as_many_workers_as_there_is_room_for(
    workers: int | tuple[int, int], cpus: int, use_gpu: bool, expected: int
) -> None:
    config = RayConfig(num_workers=workers, cpus_per_worker=cpus, max_failures=1)
    assert session.room_for(config, use_gpu=use_gpu) == expected


@pytest.mark.usefixtures("six_cores")
def test_gpus_that_are_not_there_are_refused_unless_nodes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    session.check_gpus(RayConfig(num_workers=(2, 9)), "ray.use_gpu")
    with pytest.raises(ValueError, match=r"asks for 3 GPUs; there are 2"):
        session.check_gpus(RayConfig(num_workers=(3, 9)), "ray.use_gpu")
    monkeypatch.setattr(session, "autoscales", lambda: True)
    session.check_gpus(RayConfig(num_workers=(3, 9)), "ray.use_gpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a session does to Ray, in order, without one."""
    seen: list[str] = []

    def note(name: str) -> Any:  # noqa: ANN401 - a function
        return lambda *_, **__: seen.append(name)

    for name in ("start_local", "connect", "await_room", "check_shared", "check_gpus"):
        monkeypatch.setattr(session, name, note(name))
    monkeypatch.setattr(session.ray, "is_initialized", lambda: "connect" in seen or "start_local" in seen)
    monkeypatch.setattr(session.ray, "shutdown", note("shutdown"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return iter([seen])


def experiment(**ray: Any) -> Experiment:  # noqa: ANN401 - settings
    return Experiment(output_dir="run", model=ModelConfig(name_or_path="none"), ray=RayConfig(**ray))


@pytest.mark.parametrize(
    ("ray", "expected"),
    [
        ({}, ["start_local", "shutdown"]),
        ({"use_gpu": True}, ["start_local", "check_gpus", "shutdown"]),
        ({"address": "head:6379"}, ["connect", "await_room", "check_shared", "shutdown"]),
    ],
)
def test_every_session_on_a_cluster_looks_for_room_and_at_paths(
    ray: dict[str, Any], expected: list[str], calls: Iterator[list[str]]
) -> None:
    (seen,) = calls
    with session.ray_session(experiment(**ray)):
        pass
    assert seen == expected


def test_jobs_that_share_a_session_each_look_at_their_paths(calls: Iterator[list[str]]) -> None:
    (seen,) = calls
    with session.shared_session():
        for _ in range(2):
            with session.ray_session(experiment(address="head:6379")):
                pass
    assert seen == ["connect", "await_room", "check_shared", "check_shared", "shutdown"]


def test_a_refusal_ends_the_connection(monkeypatch: pytest.MonkeyPatch, calls: Iterator[list[str]]) -> None:
    (seen,) = calls

    def refuse(_: object) -> None:
        raise ValueError("not shared")

    monkeypatch.setattr(session, "check_shared", refuse)
    with pytest.raises(ValueError, match="not shared"), session.ray_session(experiment(address="head:6379")):
        nullcontext()
    assert seen[-1] == "shutdown"


def test_workers_are_as_quiet_as_the_command() -> None:
    assert session.QUIET.items() <= cli.ENVIRONMENT.items()


def test_a_worker_has_no_bars_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether transformers was loaded before, as where a class of ours was sent, or is loaded later."""
    from transformers.utils import logging as told

    for name in session.QUIET:
        monkeypatch.delenv(name, raising=False)
    before = told.is_progress_bar_enabled()
    told.enable_progress_bar()
    try:
        session.quiet_worker()
        assert not told.is_progress_bar_enabled()
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    finally:
        (told.enable_progress_bar if before else told.disable_progress_bar)()


def test_of_a_worker_rayembed_alone_tells_more_than_warnings() -> None:
    root, ours = logging.getLogger(), logging.getLogger("rayembed")
    before = root.level, ours.level, ours.propagate, list(ours.handlers)
    root.setLevel(logging.INFO)  # as Ray Train sets it
    try:
        session.log_from_worker()
        assert logging.getLogger("rayembed.training").isEnabledFor(logging.INFO)
        assert not logging.getLogger("of.a.library").isEnabledFor(logging.INFO)
        assert logging.getLogger("of.a.library").isEnabledFor(logging.WARNING)
    finally:
        root.setLevel(before[0])
        ours.setLevel(before[1])
        ours.propagate, ours.handlers[:] = before[2], before[3]
