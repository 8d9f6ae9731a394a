"""What is wrong with a machine, a cluster or an experiment is found, with what to do, and an exit status."""

import logging
import os
import re
import resource
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rayembed import cli
from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.jobs import HarvestConfig
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.jobs import doctor, doctor_experiment, doctor_machine, doctor_ray
from rayembed.jobs.doctor import DoctorError
from rayembed.jobs.doctor_machine import Finding
from tests.conftest import write_tiny_model
from tests.jobs.conftest import MakeExperiment, StartCommand

Usage = namedtuple("Usage", "total used free")
GIB = 1 << 30


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(output_dir=str(tmp_path / "new" / "run"), model=ModelConfig(name_or_path="none"))


def levels(findings: Iterator[Finding]) -> list[tuple[str, str]]:
    found = [*findings]
    assert all(bool(finding.advice) == (finding.level != "ok") for finding in found), "what is wrong says what to do"
    return [(finding.level, finding.what) for finding in found]


def test_python_and_packages_against_our_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(doctor_machine.python_version(None)) == [("ok", "Python")]
    monkeypatch.setattr(doctor_machine.metadata, "metadata", lambda _: {"Requires-Python": ">=2,<3"})
    assert levels(doctor_machine.python_version(None)) == [("error", "Python")]
    needs = {
        "rayembed": ["numpy>=1", "torch<2", "no-such[more]>=3", "faiss-none; extra == 'gpu'", "ray>=99; extra == 'x'"],
        "numpy": None,
    }
    monkeypatch.setattr(doctor_machine.metadata, "requires", needs.get)
    found = [*doctor_machine.packages(None)]
    assert levels(iter(found)) == [
        ("error", "package"),
        ("error", "package"),
        ("warning", "package"),
        ("ok", "packages"),
    ]
    assert re.fullmatch(r"torch \S+, and rayembed is made for <2", found[0].found)
    assert found[1].advice == 'pip install "no-such[more]>=3"'
    assert re.search(r": numpy [\d.]+$", found[3].found)


def test_extras_of_packages_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"rayembed": ["ray[default]"], "ray": ["aiohttp; extra == 'default'", "absent; extra == 'tune'"]}
    monkeypatch.setattr(doctor_machine.metadata, "requires", needs.get)
    assert levels(doctor_machine.packages(None)) == [("ok", "packages")]
    needs["ray"].append("not-there>=1; extra == 'default'")
    found = next(doctor_machine.packages(None))
    assert (found.level, found.found.split(" lacks ")[1]) == ("error", "not-there of ray[default]")


def test_gpus(monkeypatch: pytest.MonkeyPatch, experiment: Experiment) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_machine, "_driver", lambda: ("", ""))
    wants = replace(experiment, ray=RayConfig(use_gpu=True, num_workers=2))
    elsewhere = replace(experiment, ray=RayConfig(use_gpu=True, address="head:6379"))
    assert levels(doctor_machine.gpus(None)) == [("ok", "GPUs")]
    assert levels(doctor_machine.gpus(wants)) == [("error", "GPUs")]
    assert levels(doctor_machine.gpus(elsewhere)) == [("ok", "GPUs")]
    monkeypatch.setattr(doctor_machine, "_driver", lambda: ("550.1", "NVIDIA H100"))
    assert levels(doctor_machine.gpus(experiment)) == [("warning", "GPUs")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    one = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: one)
    assert levels(doctor_machine.gpus(wants)) == [("error", "GPUs")]
    (found,) = doctor_machine.gpus(replace(wants, ray=RayConfig(use_gpu=True)))
    assert (found.level, found.found.split("; torch")[0]) == ("ok", "NVIDIA H100 80 GiB; driver 550.1")


def test_compilers(monkeypatch: pytest.MonkeyPatch, experiment: Experiment) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "other-c++" else f"/bin/{name}")
    header = doctor_machine.Path(doctor_machine.sysconfig.get_path("include")) / "Python.h"
    expected = "ok" if header.is_file() else "warning"
    assert levels(doctor_machine.compilers(None)) == [(expected, "compilers")]
    monkeypatch.setenv("CXX", "other-c++")
    (found,) = doctor_machine.compilers(experiment)
    assert (found.level, found.found.split(",")[0]) == ("warning", "other-c++: none")
    assert "apt install g++" in found.advice
    compiled = replace(experiment, train=TrainConfig(torch_compile=True))
    assert levels(doctor_machine.compilers(compiled)) == [("error", "compilers")]


def test_memory_disks_and_limits(monkeypatch: pytest.MonkeyPatch, experiment: Experiment) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(
        doctor_machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=32 * GIB)
    )
    monkeypatch.setattr(doctor_machine, "_memory_limit", lambda: float("inf"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, 50 * GIB))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 65536))
    checks = (doctor_machine.memory, doctor_machine.disks, doctor_machine.open_files)
    assert {level for check in checks for level, _ in levels(check(experiment))} == {"ok"}
    monkeypatch.setattr(doctor_machine, "_memory_limit", lambda: 2.0 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 60 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert levels(doctor_machine.memory(None)) == [("warning", "memory"), ("warning", "shared memory")]
    assert levels(doctor_machine.open_files(None)) == [("warning", "open files")]
    assert [level for level, _ in levels(doctor_machine.disks(experiment))] == ["warning", "warning", "ok"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, 4 * GIB))
    assert [level for level, _ in levels(doctor_machine.disks(experiment))] == ["error", "error", "ok"]


@pytest.mark.parametrize(("length", "level"), [(39, "ok"), (40, "error")])
def test_sockets_have_short_paths(length: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """107 characters are allowed, and Ray's own part below the folder has 68."""
    monkeypatch.setattr(doctor_machine, "LONGEST_SOCKET", 107)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (length - 1))
    assert levels(doctor_machine.disks(None))[-1] == (level, "paths of Ray's sockets")


def test_address_and_token(monkeypatch: pytest.MonkeyPatch, experiment: Experiment, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cluster = replace(experiment, ray=RayConfig(address="head:6379"))
    assert next(doctor_ray.address(cluster)).found == "head:6379 (ray.address)"
    assert levels(doctor_ray.authentication(None)) == [("ok", "Ray's token")]
    assert levels(doctor_ray.authentication(cluster)) == [("warning", "Ray's token")]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert levels(doctor_ray.authentication(None)) == [("ok", "Ray's token")]
    assert levels(doctor_ray.authentication(cluster)) == [("error", "Ray's token")]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "PLANTED")
    (found,) = doctor_ray.authentication(cluster)
    assert (found.level, found.found) == ("ok", "RAY_AUTH_MODE token; token from RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert levels(doctor_ray.address(None)) == [("error", "Ray's address")]
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    assert next(doctor_ray.address(None)).found == "head:1 (RAY_ADDRESS)"


def test_storage_is_tried_and_left_as_it_was(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    given = DataConfig(train=[str(tmp_path / "rows.jsonl")], corpus=[str(tmp_path / "none.jsonl")])
    found = levels(doctor_experiment.storages(replace(experiment, data=given)))
    assert found == [("ok", "output_dir"), ("ok", "cache_dir"), ("ok", "data.train"), ("error", "data.corpus")]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    in_the_way = replace(experiment, output_dir=str(tmp_path / "rows.jsonl" / "run"))
    assert levels(doctor_experiment.storages(in_the_way)) == [("error", "output_dir"), ("error", "cache_dir")]
    assert levels(doctor_experiment.storages(None)) == []
    harvest = HarvestConfig(output=str(tmp_path / "none.jsonl"))
    comes = levels(doctor_experiment.storages(replace(experiment, data=given, harvest=harvest)))
    assert comes[-1] == ("ok", "data.corpus")


def test_storage_that_does_not_answer_keeps_its_keys(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(doctor_experiment, "WITHIN_S", 1.0)
    uri = "s3://PLANTED:PLANTED@bucket/rows.jsonl?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    wrong = "s3://PLANTED:PLANTED@bucket/rows.jsonl?no_such_option=PLANTED"
    found = [*doctor_experiment.storages(replace(experiment, data=DataConfig(train=[uri, wrong])))][2:]
    assert [finding.level for finding in found] == ["error", "error"]
    assert all("s3://bucket/rows.jsonl" in finding.found for finding in found)
    assert all("AWS_ACCESS_KEY_ID" in finding.advice for finding in found)
    assert "PLANTED" not in str(found)


def test_storage_that_hangs_is_left_behind(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_experiment, "WITHIN_S", 0.1)
    monkeypatch.setattr(doctor_experiment, "_read", lambda _: time.sleep(2))
    start = time.monotonic()
    *_, found = doctor_experiment.storages(replace(experiment, data=DataConfig(train=["a.jsonl"])))
    assert (found.level, found.found) == ("error", "a.jsonl does not answer within 0.1 s")
    assert time.monotonic() - start < 1.5


def test_models(experiment: Experiment, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    ready = replace(experiment, model=ModelConfig(name_or_path=str(folder)))
    (found,) = doctor_experiment.models(ready)
    assert (found.level, found.found) == ("ok", f"{folder}: BertModel, weights as safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert levels(doctor_experiment.models(ready)) == [("warning", "model.name_or_path")]
    (folder / "pytorch_model.bin").unlink()
    assert levels(doctor_experiment.models(ready)) == [("error", "model.name_or_path")]
    bare = write_tiny_model(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    without = replace(experiment, model=ModelConfig(name_or_path=str(bare)))
    assert levels(doctor_experiment.models(without)) == [("error", "model.name_or_path")]
    absent = replace(experiment, model=ModelConfig(name_or_path=str(tmp_path / "absent"), trust_remote_code=True))
    assert levels(doctor_experiment.models(absent)) == [
        ("error", "model.name_or_path"),
        ("warning", "model.name_or_path"),
    ]


@pytest.fixture
def some_checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Check]:
    """In the place of the real ones: one fails, one is well; that of Ray would start one."""

    def broken(_: Experiment | None) -> Iterator[Finding]:
        yield Finding("ok", "first", "well")
        raise KeyError("bug")

    checks: dict[str, doctor.Check] = {"broken": broken, "well": lambda _: iter([Finding("ok", "second", "well")])}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor, "OF_RAY", {"Ray": lambda _: iter([Finding("error", "Ray", "none", "start one")])})
    monkeypatch.setattr(doctor_ray, "end", lambda: None)
    return checks


@pytest.mark.usefixtures("some_checks")
def test_rows_summary_and_status(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "rayembed"):
        assert cli.main(["doctor", "--dry-run"]) == 0
        assert capsys.readouterr().out == "2 ok, 1 warning, 0 error\n"
        assert cli.main(["doctor"]) == 1
    assert "rayembed: error: doctor: 2 ok, 1 warning, 1 error" in capsys.readouterr().err
    rows = [record.message for record in caplog.records]
    assert rows[0] == "ok      first: well"
    assert rows[1].startswith("warning broken: could not be looked at: KeyError: 'bug'\n          -> ")
    assert rows[-1] == "error   Ray: none\n          -> start one"


def test_an_experiment_may_be_given(some_checks: dict[str, doctor.Check], tmp_path: Path) -> None:
    seen: list[Experiment | None] = []

    def note(experiment: Experiment | None) -> Iterator[Finding]:
        seen.append(experiment)
        return iter([])

    some_checks["note"] = note
    (tmp_path / "e.yaml").write_text("output_dir: runs/x\nmodel: {name_or_path: some/model}\n")
    assert cli.main(["doctor", str(tmp_path / "e.yaml"), "seed=7", "--dry-run"]) == 0
    assert [experiment and experiment.seed for experiment in seen] == [7]
    with pytest.raises(DoctorError, match="1 error"):
        doctor.run(None)
    assert seen[1] is None


@pytest.mark.long
@pytest.mark.ray
def test_a_machine_on_which_all_is_well(
    start_command: StartCommand, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    """As a process, with a local Ray and token authentication; in a home of its own, where Ray puts the token."""
    home = os.environ["HOME"]
    os.environ["HOME"] = str(tmp_path)
    os.environ["RAY_AUTH_MODE"] = "token"
    try:
        command = start_command("doctor", make_experiment(tmp_path / "run"))
        status, told = command.finish(within=120)
    finally:
        os.environ["HOME"], os.environ["RAY_AUTH_MODE"] = home, "disabled"
    assert status == 0, told
    rows = re.findall(r"^\d\d:\d\d:\d\d (ok|warning|error) +([^:]+): ", told, re.MULTILINE)
    expected = {"Python", "packages", "memory", "output_dir", "data.train", "model.name_or_path", "Ray's address"}
    assert expected | {"node", "room", "Ray's dashboard", "shared paths"} <= {what for _, what in rows}
    assert "rayembed doctor: done in " in told
    token = (tmp_path / ".ray" / "auth_token").read_text()
    assert token not in told
    assert not (tmp_path / "run").exists()
