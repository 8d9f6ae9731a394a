"""A local Ray for the jobs, a small data set, experiments on it, and the command line as a process of its own."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rayembed import cli
from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.jobs import evaluate, train
from tests.conftest import tiny_tokenizer
from tests.jobs.toy_data import write_beir, write_rows
from tests.s3_server import Server, serving

MakeExperiment = Callable[..., Experiment]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # or Ray writes a token into the home directory
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
TRAIN = {  # epsilon keeps Adam from blowing rounding errors up where a gradient is zero, as that of a key's bias is
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,
    "temperature": 0.05,
    "global_batch_size": 16,
    "num_train_epochs": 2,
}


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> Iterator[None]:
    """What every Ray of these tests is started with, in this process or in one that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**cli.ENVIRONMENT, **ENVIRONMENT}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def local_ray(ray_environment: None) -> Iterator[None]:
    """A Ray of 2 cores in which all jobs of this process run; `ray_session` takes the one that is there."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data set of toy_data.py."""
    return write_beir(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="session")
def make_experiment(beir: Path, tiny_model: Path) -> MakeExperiment:
    """An experiment on the small data set, in float32 and several units; keyword arguments add to its sections."""

    def make(output_dir: Path, **sections: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
        settings: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(tiny_model), "pooling": "mean"},
            "data": {
                "train": [str(beir)],
                "corpus": [str(beir)],
                "evaluation": str(beir),
                "train_group_size": 3,
                "query_max_len": 24,
                "passage_max_len": 48,
            },
            "encode": {"dtype": "float32", "passages_per_unit": 50, "queries_per_unit": 32},
            "ray": {"num_workers": 1},
        }
        for name, given in sections.items():
            settings[name] = {**settings.get(name, {}), **given}
        return Experiment(output_dir=str(output_dir), **settings)  # type: ignore[arg-type] # pydantic reads the dicts

    return make


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 2-layer cross-encoder with one logit, whose scores differ from pair to pair."""
    folder = tmp_path_factory.mktemp("tiny-reranker")
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Command:
    """A `rayembed` that runs as a process of its own."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def finish(self, *, within: float = 240) -> tuple[int, str]:
        """Exit status, and everything that it wrote."""
        status = self.process.wait(within)
        return status, self.log.read_text()


StartCommand = Callable[..., Command]


@pytest.fixture(scope="session")
def start_command(ray_environment: None) -> Iterator[StartCommand]:
    """Starts `rayembed JOB` on an experiment, whose file is written beside its run folder; none outlives the tests."""
    started: list[Command] = []

    def start(job: str, experiment: Experiment, *words: str) -> Command:
        out = Path(experiment.output_dir)
        file, log = out.with_name(f"{out.name}.yaml"), out.with_name(f"{out.name}.log")
        file.write_text(dump(experiment))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("rayembed"), job, file, *words], stdout=output, stderr=subprocess.STDOUT
            )
        started.append(Command(process, log))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()


@pytest.fixture(scope="session")
def trained(
    local_ray: None, make_experiment: MakeExperiment, beir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    """Trained for 10 steps on one worker without dropout, in a run folder with nothing else."""
    folder = tmp_path_factory.mktemp("trained")
    rows = write_rows(beir, folder / "rows.jsonl")
    experiment = make_experiment(
        folder / "run", data={"train": [str(rows)]}, model={"dropout": 0.0}, train=TRAIN, export={"probe_texts": 8}
    )
    train.run(experiment)
    return experiment


@pytest.fixture(scope="session")
def evaluated(trained: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The trained model and the base model evaluated, in a run folder of their own."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained.output_dir, out)
    experiment = replace(trained, output_dir=str(out))
    evaluate.run(experiment)
    return experiment


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A bucket of S3."""
    with serving(monkeypatch, tmp_path / "scratch") as running:
        yield running


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """The same, which fails when a test says so, and knows what it was asked."""
    with serving(monkeypatch, tmp_path / "scratch", proxy=True) as running:
        yield running
