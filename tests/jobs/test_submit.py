"""The quickstart's command as a submitted job, on a head and two workers with token authentication."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rayembed.config.loading import dump
from tests.jobs.conftest import MakeExperiment
from tests.jobs.started_nodes import BIN, Cluster, started_nodes
from tests.jobs.test_secrets import ENVIRONMENT, PLANTED, bucket, copied, files_with

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
assert bucket is not None, "a fixture"
SECRETS = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_AUTH_TOKEN"}
JOBS = {
    "mine": {"range_for_sampling": "0-12", "negative_number": 3},
    "train": {"learning_rate": 1e-3, "temperature": 0.05, "global_batch_size": 16, "max_steps": 6, "save_steps": 3},
    "evaluate": {"k_values": [10]},
    "export": {"probe_texts": 8},
    "ray": {"num_workers": 2},
}


@pytest.fixture(scope="module")
def cluster(ray_environment: None) -> Iterator[Cluster]:
    before = {name: os.environ.get(name) for name in SECRETS}
    os.environ.update(SECRETS)  # of the nodes, and so of all that runs on them
    try:
        with started_nodes(2) as made:
            yield made
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def test_a_submitted_run_and_no_secret_in_what_it_leaves(
    cluster: Cluster, make_experiment: MakeExperiment, beir: Path, bucket: str, tmp_path: Path
) -> None:
    """Data on S3 with keys in their URIs; two workers mine, train and evaluate."""
    copied(beir, bucket)
    sources, uri = tmp_path / "sources", bucket % ""
    sources.mkdir()
    experiment = make_experiment(tmp_path / "run", model={"dropout": 0.0}, **JOBS)
    settings = yaml.safe_load(dump(experiment))
    settings["data"] |= {"train": [uri], "corpus": [uri], "evaluation": uri}
    (sources / "experiment.yaml").write_text(yaml.safe_dump(settings))
    ended = cluster.submit(sources, str(BIN / "rayembed"), "run", "experiment.yaml")
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told
    assert re.search(r"Ray at [\d.]+:\d+: 3 nodes, 2 CPUs, 0 GPUs", told)
    assert "result: ndcg@10 " in told
    run = tmp_path / "run"
    assert (run / "report.html").is_file()
    assert (run / "model" / "model.safetensors").is_file()
    assert PLANTED not in told
    assert files_with(run, PLANTED) == []
    # What Ray wrote has neither keys nor token, but the copy of the submitted folder, which is the user's.
    left = files_with(cluster.folder, PLANTED)
    assert [path for path in left if not path.endswith("/experiment.yaml")] == []
    readable(told)


def readable(told: str) -> None:
    """Lines of the log of a job are whole, and say each thing once."""
    assert "\r" not in told
    assert "Loading weights" not in told, "bars of progress are for terminals"
    lines = [re.sub(r"\x1b\[\d*m|\(.*?pid=\d+.*?\) ?|^\d\d:\d\d:\d\d ", "", line) for line in told.splitlines()]
    warnings = [line for line in lines if "Warning" in line or "WARNING" in line]
    assert warnings == []


def test_who_has_no_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """By `ray job submit`, and in words where a command connects by itself."""
    (tmp_path / "e.yaml").write_text(f"output_dir: {tmp_path}/run\nmodel: {{name_or_path: none}}\n")
    without = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    ended = cluster.submit(tmp_path, "echo", "let in", **without, RAY_AUTH_MODE="disabled")
    assert ended.returncode != 0
    assert "let in" not in ended.stdout
    cases = {
        "set RAY_AUTH_MODE=token": {**without, "RAY_AUTH_MODE": "disabled"},
        "RAY_AUTH_MODE is token, and there is none in": without,
        "the token of RAY_AUTH_TOKEN is not the cluster's": {"RAY_AUTH_TOKEN": "0" * 40},
    }
    for words, environment in cases.items():
        start = time.monotonic()
        ended = cluster.run(BIN / "rayembed", "doctor", RAY_ADDRESS=cluster.address, **environment)
        seconds = time.monotonic() - start
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert words in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr
        assert seconds < 45, words


def test_a_run_folder_of_one_machine_is_refused(
    cluster: Cluster, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    """A third node that has another file system where the run folder lies, as a machine without the mount has."""
    blind = f'mount -t tmpfs none {tmp_path} && exec "$@"'
    cluster.add_worker(before=["unshare", "--mount", "sh", "-c", blind, "sh"])
    try:
        await_nodes(cluster, 4)
        sources = tmp_path / "sources"
        sources.mkdir()
        (sources / "experiment.yaml").write_text(dump(make_experiment(tmp_path / "run", **JOBS)))
        ended = cluster.submit(sources, str(BIN / "rayembed"), "run", "experiment.yaml")
        told = ended.stdout + ended.stderr
        assert ended.returncode == 1, told
        assert re.search(rf"output_dir {tmp_path}/run: what is written here is not seen on \S+ \([\d.]+\)", told)
        assert "NFS" in told
        assert not (tmp_path / "run" / "mine").exists()
    finally:
        cluster.remove_worker()


def await_nodes(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listed = cluster.run(BIN / "ray", "list", "nodes", "--address", cluster.dashboard).stdout
        if len(re.findall(r"ALIVE", listed)) == count:
            return
        time.sleep(1)
    raise AssertionError(listed)
