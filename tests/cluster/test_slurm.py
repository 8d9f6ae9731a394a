"""slurm.sh: what it says to Slurm, and what it does on two machines that are one."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm_here import SCRIPT, Job, submitted
from tests.conftest import write_tiny_model
from tests.jobs.toy_data import write_beir, write_rows

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
TEXT = SCRIPT.read_text()
# Stands for rayembed: looks at the Ray that it was started in, from inside and without the token.
LOOKS = """
import glob, json, os, subprocess, sys, time, urllib.error, urllib.request
import ray
ray.init(logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"]]
stranger = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
refused = subprocess.run(
    [sys.executable, "-c", "import ray; ray.init(logging_level='ERROR')"], env=stranger, capture_output=True, text=True
)


def answer(place, path):
    deadline = time.monotonic() + 60
    while True:  # nodes are there before the dashboard is
        try:
            return urllib.request.urlopen(f"http://{place}{path}", timeout=20).read().decode()
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
dashboard = f"127.0.0.1:{int(port) + 1}"
(agent, *_) = glob.glob(os.environ["RAY_TMPDIR"] + "/ray/session_2*/dashboard_agent_listen_port_*")
mode = os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777
found = {
    "words": sys.argv[1:],
    "cpus": [node["Resources"].get("CPU") for node in nodes],
    "stranger": refused.returncode,
    "why": refused.stderr[-2000:],
    "mode": mode,
    "head": answer(dashboard, "/api/gcs_healthz"),
    "worker": answer(f"{host}:{open(agent).read().strip()}", "/api/local_raylet_healthz"),
    "jobs": answer(dashboard, "/api/jobs/"),
}
with open("found.json", "w") as file:
    json.dump(found, file)
sys.exit(7)
"""


def checked(text: str) -> list[str]:
    """What bash and shellcheck say against a script."""
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    linted = subprocess.run([SHELLCHECK, "--format=gcc", "-"], input=text, capture_output=True, text=True, check=False)
    return parsed.stderr.splitlines() + linted.stdout.splitlines()


def test_nothing_is_wrong_with_the_shell() -> None:
    assert checked(TEXT) == []


@pytest.mark.parametrize(
    ("there", "mistake", "words"),
    [("until answers; do\n", "until answers\n", "syntax error"), ('"$RAY_TMPDIR/ray"', "$RAY_TMPDIR/ray", "SC2086")],
)
def test_a_mistake_in_the_shell_is_found(there: str, mistake: str, words: str) -> None:
    assert there in TEXT
    found = checked(TEXT.replace(there, mistake, 1))
    assert any(words in problem for problem in found), found


def test_what_it_asks_of_slurm() -> None:
    asked = dict(line.partition("=")[::2] for line in re.findall(r"^#SBATCH --(\S+)$", TEXT, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"  # one Ray a machine
    assert "requeue" in asked
    assert asked["open-mode"] == "append"  # the log of the time before stays
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])  # to the script alone, which has a trap for it
    assert re.search(r"^trap .* USR1", TEXT, re.MULTILINE)
    first = TEXT.index("#SBATCH")
    assert not [line for line in TEXT[:first].splitlines() if line and not line.startswith("#")]  # or it is not read


def test_it_ends_nothing_that_it_did_not_start() -> None:
    assert not re.search(r"ray stop|pkill|killall|kill -9|scancel", TEXT)


def test_it_says_how_it_is_called(tmp_path: Path) -> None:
    called = subprocess.run(["bash", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert called.returncode == 2
    assert "usage: sbatch" in called.stderr


def test_a_machine_without_ray_ends_the_job(tmp_path: Path) -> None:
    with submitted(tmp_path, ["run", "x.yaml"], machines=2, ray="exit 3") as job:
        assert job.process.wait(240) == 1
    assert "Ray did not start" in job.log
    assert job.left() == []
    assert not job.token.exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_ray_of_all_machines_runs_the_command_and_ends(tmp_path: Path) -> None:
    with submitted(tmp_path, ["run", "a b.yaml", "x=1"], machines=2, command=LOOKS) as job:
        status = job.process.wait(240)
    assert status == 7, job.log  # the command's own
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["words"] == ["run", "a b.yaml", "x=1"]
    assert found["cpus"] == [1.0, 1.0]
    assert found["stranger"] != 0
    assert "token" in found["why"].lower()
    assert found["mode"] == 0o600
    assert found["head"] == found["worker"] == "success"  # what the health checks of compose.yaml and KubeRay ask for
    assert found["jobs"] == 401  # without the token
    assert job.left() == []
    assert not job.token.exists()
    assert not job.temporary.exists()
    assert not job.requeued()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_whose_time_is_over_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "toy")
    write_tiny_model(tmp_path / "model")
    rows = write_rows(folder, tmp_path / "rows.jsonl")
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tmp_path}/model, pooling: mean, dropout: 0}}\n"
        f"data: {{train: [{rows}], query_max_len: 24, passage_max_len: 48, train_group_size: 3}}\n"
        "train: {learning_rate: 1e-3, global_batch_size: 16, num_train_epochs: 300, save_steps: 10000}\n"
        "ray: {num_workers: 2}\n"
    )
    with submitted(tmp_path, ["run", str(experiment)], machines=2) as job:
        assert first_step_told(job, after=0) <= 20
        job.process.send_signal(signal.SIGUSR1)
        assert job.process.wait(240) != 0
    assert job.requeued(), job.log
    assert job.left() == []
    assert (
        "a machine of this run is about to be taken away; saving a checkpoint" in job.log
    )  # save_steps is out of reach
    before = len(job.log)
    with submitted(tmp_path, ["run", str(experiment)], machines=2) as job:
        assert first_step_told(job, after=before) > 20
    assert job.process.returncode == 143  # as by scancel
    assert job.left() == []
    assert not job.token.exists()


def first_step_told(job: Job, *, after: int) -> int:
    """Waits until the log, from a place on, has a line of progress of training; the step that it tells."""
    deadline = time.monotonic() + 240
    while True:
        if found := re.search(r"train ([\d,]+)/1,500 steps", job.log[after:]):
            return int(found[1].replace(",", ""))
        assert time.monotonic() < deadline, job.log
        assert job.process.poll() is None, job.log
        time.sleep(0.2)
