"""A local Ray for the jobs, a small data set, experiments on it, and the command line as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rayembed.config import Experiment
from rayembed.config.loading import dump
from tests.conftest import tiny_tokenizer
from tests.jobs.toy_data import write_beir

MakeExperiment = Callable[..., Experiment]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # or Ray writes a token into the home directory
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> Iterator[None]:
    """What every Ray of these tests is started with, in this process or in one that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def local_ray(ray_environment: None) -> Iterator[None]:
    """A Ray of 2 cores in which all jobs of this process run; `ray_session` takes the one that is there."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data set of toy_data.py."""
    return write_beir(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="session")
def make_experiment(beir: Path, tiny_model: Path) -> MakeExperiment:
    """An experiment on the small data set, in float32 and several units; keyword arguments add to its sections."""

    def make(output_dir: Path, **sections: Any) -> Experiment:
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
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RunCommand = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def start_command(ray_environment: None) -> RunCommand:
    """Starts `rayembed JOB` on an experiment, which is written beside its run folder; its messages go to stdout."""

    def start(job: str, experiment: Experiment, *words: str) -> "subprocess.Popen[str]":
        out = Path(experiment.output_dir)
        file = out.with_name(f"{out.name}.yaml")
        file.write_text(dump(experiment))
        return subprocess.Popen(
            [sys.executable, "-m", "rayembed.cli", job, str(file), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )

    return start
