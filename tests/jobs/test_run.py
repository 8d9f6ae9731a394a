"""The whole `rayembed run` as a user starts it, and what it says when something is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayembed import cli
from rayembed.config import Experiment
from rayembed.config.loading import dump, load
from tests.jobs.conftest import TRAIN, MakeExperiment, StartCommand
from tests.jobs.toy_data import NUM_TRAIN, read_lines

pytestmark = pytest.mark.ray
RUN_FILES = [
    *("config.yaml", "report.html", "mine/stats.json", "score/stats.json", "train/metrics.jsonl"),
    *("model/model.safetensors", "model/modules.json", "model/README.md", "evaluate/metrics.json"),
    *("evaluate/base.trec", "evaluate/tuned.trec"),
]


@pytest.fixture(scope="module")
def whole(make_experiment: MakeExperiment, tiny_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment with every section that takes part in a run."""
    train: dict[str, Any] = {**TRAIN, "knowledge_distillation": True, "num_train_epochs": 1}
    return make_experiment(
        tmp_path_factory.mktemp("whole") / "run",
        mine={"range_for_sampling": "2-20", "negative_number": 4},
        score={"model": str(tiny_reranker), "max_len": 64},
        train=train,
        evaluate={"k_values": [10]},
        export={"probe_texts": 8},
    )


@pytest.fixture(scope="module")
def output(whole: Experiment, start_command: StartCommand) -> str:
    """What the command wrote that ran the experiment to its end, in a Ray that it started itself."""
    status, text = start_command("run", whole).finish()
    assert status == 0, text
    return text


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where Ray is started or asked for."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("ray.shutdown", lambda: None)


def written(experiment: Experiment) -> str:
    """The experiment's file."""
    file = Path(experiment.output_dir).with_name("experiment.yaml")
    file.write_text(dump(experiment))
    return str(file)


def test_a_run_writes_all_that_it_promises(whole: Experiment, output: str) -> None:
    out = Path(whole.output_dir)
    assert [name for name in RUN_FILES if not (out / name).is_file()] == []
    assert load(str(out / "config.yaml")) == whole
    rows = read_lines(out / "score")
    assert len(rows) == NUM_TRAIN
    assert all(len(row["neg_scores"]) == len(row["neg"]) == 4 for row in rows)
    assert len(read_lines(out / "train" / "metrics.jsonl")) == NUM_TRAIN // 16
    metrics = json.loads((out / "evaluate" / "metrics.json").read_text())
    assert metrics["significance"]["num_queries"] == 20
    assert not list(out.glob("*.partial"))
    assert "result: ndcg@10" in output


def test_the_same_run_again_does_nothing(
    whole: Experiment, output: str, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(whole.output_dir)
    folders = [out / name for name in ("mine", "score", "train", "model", "evaluate")]
    before = [folder.stat().st_ino for folder in folders]
    assert cli.main(["run", written(whole)]) == 0, capsys.readouterr().err
    assert [folder.stat().st_ino for folder in folders] == before


def test_a_dry_run_tells_the_plan_and_writes_no_folder_of_a_job(
    whole: Experiment, no_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = replace(whole, output_dir=str(tmp_path / "run"))
    assert cli.main(["run", written(fresh), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"mine: {NUM_TRAIN} queries against 120 passages" in plan
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"cache"}


@pytest.mark.parametrize("job", ["run", "mine", "train"])
def test_a_bad_line_is_named_before_ray_starts(
    job: str, whole: Experiment, no_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "baba", "pos": ["didi"], "neg": ["kuku"]}\n{"query": "lolo", "pos": "didi"}\n')
    bad = replace(
        whole, output_dir=str(tmp_path / "run"), data=replace(whole.data, train=[str(rows)]), mine=None, score=None
    )
    assert cli.main([job, written(bad)]) == 1
    error = capsys.readouterr().err
    assert f"{rows}:2" in error
    assert "pos" in error


def test_a_model_that_is_not_there_is_named_before_ray_starts(
    whole: Experiment, no_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = replace(
        whole,
        output_dir=str(tmp_path / "run"),
        model=replace(whole.model, name_or_path=str(tmp_path / "no-such-model")),
    )
    assert cli.main(["run", written(missing)]) == 1
    assert "no-such-model" in capsys.readouterr().err


def test_more_workers_than_the_machine_has_cores_are_refused(
    whole: Experiment, start_command: StartCommand, tmp_path: Path
) -> None:
    many = replace(whole, output_dir=str(tmp_path / "run"), ray=replace(whole.ray, num_workers=512), train=None)
    status, text = start_command("mine", many).finish()
    assert status == 1
    assert "ray.num_workers 512 x ray.cpus_per_worker 1 asks for 512 CPU cores; this machine has" in text


def test_config_yaml_holds_every_default(whole: Experiment, output: str) -> None:
    resolved = yaml.safe_load((Path(whole.output_dir) / "config.yaml").read_text())
    assert resolved["train"]["weight_decay"] == 0.0
    assert resolved["data"]["evaluation_split"] == "test"
