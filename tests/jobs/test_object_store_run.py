"""All jobs by the command line on S3 and a real Ray: killed, and gone on with by a machine that was never there."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from rayembed.config import Experiment
from rayembed.jobs import run
from tests.jobs.cluster import cluster
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.store_commands import WITHIN, Command, files_without_keys
from tests.s3_server import KEYS, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
STEPS, SAVE = 40, 5


@pytest.fixture
def experiment(make_experiment: MakeExperiment, tmp_path: Path) -> Experiment:
    settings: dict[str, Any] = {**TRAIN, "global_batch_size": 8, "max_steps": STEPS, "save_steps": SAVE}
    mined = {"range_for_sampling": "2-20", "negative_number": 3}
    return make_experiment(
        tmp_path / "local" / "run", mine=mined, train=settings, evaluate={}, export={"formats": ["bfloat16"]}
    )


def assert_same_result(there: dict[str, bytes], local: Path) -> None:
    ours, theirs = load(there["model/model.safetensors"]), load_file(local / "model" / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert ours.keys() == theirs.keys()
    for name in ("evaluate/metrics.json", "evaluate/tuned.trec", "mine/part-00000.jsonl", "train/probe.npy"):
        assert there[name] == (local / name).read_bytes(), name
    lines = there["train/metrics.jsonl"].decode().splitlines()
    assert len(lines) == len((local / "train" / "metrics.jsonl").read_text().splitlines()) == STEPS
    for folder in ("mine", "train", "evaluate", "model", "model-bfloat16"):
        assert f"{folder}/_SUCCESS" in there
        assert f"{folder}/_PARTIAL" not in there
    assert {"config.yaml", "report.html", "check.txt", "model/README.md"} <= set(there)
    assert any(name.startswith("train/tensorboard/") for name in there)


def test_a_run_that_is_killed_in_training_is_gone_on_with_from_the_store(
    server: Server, local_ray: None, experiment: Experiment, tmp_path: Path
) -> None:
    run.run(experiment)
    remote = replace(experiment, output_dir=server.uri("run"))
    first = Command(remote, tmp_path / "commands", "first")
    deadline = time.monotonic() + WITHIN
    while server.files("run/train").get("metrics.jsonl", b"").count(b"\n") < 3 * SAVE:
        assert first.process.poll() is None, first.log.read_text()
        assert time.monotonic() < deadline, first.log.read_text()
        time.sleep(0.05)
    first.kill()
    half = server.files("run")
    assert "train/_SUCCESS" not in half
    assert "model/_SUCCESS" not in half

    output = Command(remote, tmp_path / "commands", "second").finish()
    assert "mine: s3://bucket/run/mine: up to date" in output or "s3://bucket/run/mine: up to date" in output
    assert "resumed after step" in output
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in first.log.read_text() + output
    assert_same_result(files_without_keys(server, "run"), Path(experiment.output_dir))

    output = Command(remote, tmp_path / "commands", "third").finish()
    assert "train: 1" not in output
    assert output.count("up to date, nothing to do") >= 3


def test_two_nodes_with_disks_of_their_own(
    server: Server, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is on a third; each node of the cluster has another scratch folder."""
    on_one = replace(experiment, ray=replace(experiment.ray, num_workers=2))
    remote = replace(on_one, output_dir=server.uri("run"))
    with cluster(2, scratch=tmp_path / "nodes") as nodes:
        output = Command(remote, tmp_path / "commands", "driver", RAY_ADDRESS=nodes.address).finish()
    there = files_without_keys(server, "run")
    assert {"report.html", "model/_SUCCESS", "train/_SUCCESS", "evaluate/metrics.json"} <= set(there)
    assert "result: " in output
    for node in (0, 1):
        assert list((tmp_path / "nodes" / str(node)).rglob("*.arrow")), "it was at work"
    Command(on_one, tmp_path / "commands", "local").finish()
    assert_same_result(there, Path(experiment.output_dir))
