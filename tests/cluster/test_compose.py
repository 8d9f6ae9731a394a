"""compose.yaml is right, and each check finds the mistake that it is for."""

import pytest

from tests.cluster.compose import problems
from tests.cluster.shipped import GONE, Keys, load, planted

HEAD: Keys = ("services", "head")
WORKER: Keys = ("services", "worker")
STARTED = "ray start --block --head --num-cpus=0"
MISTAKES: list[tuple[Keys, object, str]] = [
    ((*HEAD, "comand"), "x", "'comand' was unexpected"),
    ((*HEAD, "healthcheck", "retries"), [3], "is not"),
    (HEAD, GONE, "no service head"),
    ((*HEAD, "image"), "rayembed:latest", "the tag must be"),
    ((*WORKER, "image"), "rayembed:0.1.0-ray2.59.1-cpu", "its Ray is 2.59.1"),
    ((*HEAD, "ports"), ["8265:8265"], "open to the world"),
    ((*HEAD, "ports"), ["127.0.0.1:8265:8265", "0.0.0.0:10001:10001"], "open to the world"),
    ((*WORKER, "ports"), ["127.0.0.1:52365:52365"], "publishes no ports"),
    ((*WORKER, "environment", "RAY_AUTH_MODE"), "disabled", "must be token"),
    ((*WORKER, "secrets"), [], "must be one of its secrets"),
    ((*WORKER, "environment", "RAY_AUTH_TOKEN"), "abc", "a secret must come from"),
    ((*HEAD, "environment", "AWS_SECRET_ACCESS_KEY"), "abc", "a secret must come from"),
    ((*HEAD, "environment", "HF_HOME"), "hf_abcdefghijklmnopqrstuvwx", "a secret is written out"),
    (("secrets", "ray_token", "file"), "./token", "named by a variable"),
    ((*WORKER, "volumes"), [], "must be mounted at /shared"),
    (("volumes",), {}, "must be mounted at /shared"),
    ((*WORKER, "shm_size"), GONE, "shm_size is missing"),
    ((*WORKER, "healthcheck"), GONE, "healthcheck is missing"),
    ((*WORKER, "cap_drop"), ["NET_RAW"], "are missing"),
    ((*WORKER, "privileged"), True, "more of the machine"),
    ((*WORKER, "network_mode"), "host", "more of the machine"),
    ((*HEAD, "command"), "ray start --block --head", "--num-cpus=0"),
    ((*HEAD, "command"), STARTED.replace(" --block", ""), "--block"),
    ((*HEAD, "command"), f"{STARTED} --dashbord-host=127.0.0.1", "is no option"),
    ((*WORKER, "command"), "ray start --block --address=localhost:6379", "--address=head"),
    ((*WORKER, "depends_on", "head", "condition"), "service_started", "until the head is healthy"),
]


def test_nothing_is_wrong() -> None:
    assert problems(load("compose.yaml")) == []


@pytest.mark.parametrize(("keys", "value", "words"), MISTAKES, ids=[mistake[2] for mistake in MISTAKES])
def test_a_mistake_is_found(keys: Keys, value: object, words: str) -> None:
    found = problems(planted(load("compose.yaml"), keys, value))
    assert any(words in problem for problem in found), found
