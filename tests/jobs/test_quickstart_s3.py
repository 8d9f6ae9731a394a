"""The whole quickstart with data and run folder on S3: uploads fail, the machine is lost, and nothing else is."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs.store_commands import Command, files_without_keys
from tests.s3_server import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(4000)]
QUICKSTART, SAVE = Path("configs/quickstart.yaml"), 10
HOUR = 3600.0


def on_the_store(server: Server) -> dict[str, Any]:
    """The quickstart's experiment, whose paths are in the bucket."""
    written = QUICKSTART.read_text()
    for name in ("runs/quickstart-data", "runs/quickstart"):
        written = written.replace(f" {name}\n", f" {json.dumps(server.uri(name))}\n")
        written = written.replace(f"[{name}]", json.dumps([server.uri(name)]))
    settings: dict[str, Any] = yaml.safe_load(written)
    assert "runs/" not in json.dumps(settings).replace("bucket/runs/", "")
    settings["train"]["save_steps"] = SAVE
    return settings


def steps_there(server: Server) -> int:
    """Of which the figures are on the store."""
    return server.read("runs/quickstart/train/metrics.jsonl").count(b"\n")


def test_the_quickstart(ray_environment: None, proxied: Server, tmp_path: Path) -> None:
    settings, commands = yaml.safe_dump(on_the_store(proxied)), tmp_path / "commands"
    first = Command(settings, commands, "first")

    def wait_for(steps: int) -> None:
        deadline = time.monotonic() + HOUR
        while steps_there(proxied) < steps:
            assert first.process.poll() is None, first.log.read_text()
            assert time.monotonic() < deadline, first.log.read_text()
            time.sleep(0.2)

    wait_for(SAVE)
    proxied.how, proxied.failing = "cut", "/train/checkpoints/"
    while len(proxied.failures) < 2:
        assert first.process.poll() is None, first.log.read_text()
        time.sleep(0.1)
    proxied.failing = ""
    wait_for(SAVE * 3)
    first.kill()
    half = proxied.paths("runs/quickstart")
    assert "mine/_SUCCESS" in half
    assert "train/_SUCCESS" not in half

    proxied.failing = "/model/model.safetensors"
    status, output = Command(settings, commands, "second").end(HOUR)
    assert status == 1, output
    assert "resumed after step" in output
    assert "model/model.safetensors" in output
    assert "model/_SUCCESS" not in proxied.paths("runs/quickstart")

    proxied.failing = ""
    output = Command(settings, commands, "third").finish(HOUR)
    there = files_without_keys(proxied, "runs")
    told = json.loads(there["quickstart/evaluate/metrics.json"])
    assert {"quickstart-data/corpus.jsonl", "quickstart/model/_SUCCESS", "quickstart/report.html"} <= set(there)
    lines = [json.loads(line) for line in there["quickstart/train/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert told["tuned"]["ndcg@10"] > told["base"]["ndcg@10"], told
