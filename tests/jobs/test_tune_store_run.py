"""Sweeps on S3 and a real Ray: killed with their machine, and on nodes with disks of their own."""

import json
import time
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayembed.config import Experiment
from rayembed.jobs import tune
from rayembed.jobs.tune_trials import known_trials
from tests.jobs.cluster import cluster
from tests.jobs.conftest import MakeExperiment
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.store_commands import WITHIN, Command, files_without_keys
from tests.s3_server import KEYS, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
STEPS, EVALUATE, SAVE = 40, 20, 5
TRIALS = "tune/trials"


@pytest.fixture
def experiment(make_experiment: MakeExperiment, beir: Path, tmp_path: Path) -> Experiment:
    """Two trials, one after the other."""
    settings: dict[str, Any] = {"eval_steps": EVALUATE, "max_steps": STEPS, "save_steps": SAVE}
    settings |= {"per_device_train_batch_size": 4, "global_batch_size": 4}
    data = with_dev_split(beir, tmp_path / "toy")
    asked: dict[str, Any] = {"num_samples": 2, "max_concurrent": 1}
    return make_sweep(make_experiment, tmp_path / "local" / "run", data, tune=asked, train=settings)


def results(there: dict[str, bytes]) -> dict[str, Any]:
    """By the names of the trials."""
    found = {name.split("/")[2]: json.loads(text) for name, text in there.items() if name.endswith("result.json")}
    return {name: found[name] for name in sorted(found)}


def wait_for_second_trial(server: Server, command: Command) -> None:
    """Until it has saved several checkpoints."""
    deadline = time.monotonic() + WITHIN
    saved = f"checkpoints/step-{3 * SAVE:08d}/"
    while True:
        paths = server.paths(f"run/{TRIALS}")
        ended = {path.split("/")[0] for path in paths if path.endswith("result.json")}
        if ended and any(saved in path and path.split("/")[0] not in ended for path in paths):
            return
        assert command.process.poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.05)


def sent_again(server: Server) -> list[str]:
    """Files of trials that were sent more than once, but for marks (of folders too) and for what grows."""
    sent = Counter(
        request.partition("?")[0].partition(f"/run/{TRIALS}/")[2]
        for request in server.requests
        if request.startswith("PUT")
    )
    grows = ("_PARTIAL", "/checkpoints/", "metrics.jsonl", "evaluations.jsonl", "/tensorboard/")
    files = [path for path, count in sent.items() if count > 1 and path and not path.endswith("/")]
    return [path for path in files if not any(part in path for part in grows)]


def assert_whole(there: dict[str, bytes]) -> None:
    """All of a sweep of two trials is there, and nothing that is large."""
    found = results(there)
    assert [own["status"] for own in found.values()] == ["done"] * 2
    for name, own in found.items():
        assert [step for step, _ in own["evaluations"]] == [0, EVALUATE, STEPS]
        assert len(there[f"{TRIALS}/{name}/train/metrics.jsonl"].splitlines()) == STEPS
        assert f"{TRIALS}/{name}/train/_SUCCESS" in there
        assert not [path for path in there if path.startswith(f"{TRIALS}/{name}/train/checkpoints")]
        assert not [path for path in there if path.startswith(f"{TRIALS}/{name}/model")]
    rows = pq.read_table(BytesIO(there["tune/results.parquet"])).to_pylist()
    assert {row["name"]: row["ndcg@10"] for row in rows} == {
        name: max(figure for step, figure in own["evaluations"] if step) for name, own in found.items()
    }
    assert {"tune/best.yaml", "tune/sweep.json", "report.html"} <= set(there)
    assert {"train/_SUCCESS", "model/_SUCCESS", "model/model.safetensors"} <= set(there)


def test_a_sweep_that_is_killed_with_its_machine_is_gone_on_with_from_the_store(
    server: Server, local_ray: None, experiment: Experiment, tmp_path: Path
) -> None:
    tune.run(experiment)
    assert experiment.tune is not None
    remote = replace(experiment, output_dir=server.uri("run"), tune=replace(experiment.tune, then="train"))
    first = Command(remote, tmp_path / "commands", "first", job="tune")
    wait_for_second_trial(server, first)
    first.kill()
    half = server.files("run")
    assert len(results(half)) == 1

    output = Command(remote, tmp_path / "commands", "second", job="tune").finish()
    assert output.count("resumed after step") == 1
    assert "s3://bucket/run/mine: up to date" in output
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in first.log.read_text() + output
    there = files_without_keys(server, "run")
    assert results(half).items() <= results(there).items(), "what was finished stays"
    assert_whole(there)
    for trial in known_trials(Path(experiment.output_dir) / "tune"):
        assert trial.result is not None
        assert [tuple(found) for found in results(there)[trial.name]["evaluations"]] == trial.result.evaluations

    output = Command(remote, tmp_path / "commands", "third", job="tune").finish()
    assert "all 2 trials are done" in output
    assert "train: 1" not in output
    assert results(server.files("run")) == results(there)


def test_trials_beside_each_other_on_nodes_with_disks_of_their_own(
    proxied: Server, experiment: Experiment, tmp_path: Path
) -> None:
    """The command has a scratch folder of its own, the node of the trials' actors another, each worker's a third."""
    assert experiment.tune is not None
    sweep = replace(experiment.tune, max_concurrent=None, then="train")
    remote = replace(experiment, output_dir=proxied.uri("run"), tune=sweep)
    with cluster(2, scratch=tmp_path / "nodes") as nodes:
        output = Command(remote, tmp_path / "commands", "driver", job="tune", RAY_ADDRESS=nodes.address).finish()
    assert "2 trials at a time" in output
    assert any(f"/run/{TRIALS}/" in request for request in proxied.requests)
    assert sent_again(proxied) == []
    there = files_without_keys(proxied, "run")
    assert_whole(there)
    assert "There is no train/metrics.jsonl" not in there["report.html"].decode()
    for node in (0, 1):
        assert list((tmp_path / "nodes" / str(node)).rglob("tune/trials/*/train*/metrics.jsonl")), "it trained one"
