"""What a job's result depends on is in its record, and what it does not depend on is not: nothing stale is served."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig
from rayembed.config.mine import MineConfig
from rayembed.config.score import ScoreConfig
from rayembed.config.train import TrainConfig
from rayembed.jobs import encode, evaluate, mine, score, train
from rayembed.jobs.inputs import training_rows
from tests.jobs.conftest import MakeExperiment

Change = Callable[[Experiment], Experiment]


def reads(job: str, experiment: Experiment) -> dict[str, Any]:
    """The record that a job would write."""
    if job == "mine":
        return mine._reads(experiment, experiment.mine or MineConfig(), mine._data(experiment))
    if job == "evaluate":
        return evaluate._reads(experiment, experiment.evaluate or EvaluateConfig(), evaluate._data(experiment))
    if job == "encode":
        return encode._reads(experiment, encode._data(experiment))
    rows, _ = training_rows(experiment, after=())
    if job == "train":
        return train._reads(experiment, rows)
    return score._reads(experiment, score._section(experiment), rows)


def model(**changes: Any) -> Change:  # noqa: ANN401 - what YAML may hold
    return lambda experiment: replace(experiment, model=replace(experiment.model, **changes))


def section(name: str, **changes: Any) -> Change:  # noqa: ANN401
    return lambda experiment: replace(experiment, **{name: replace(getattr(experiment, name), **changes)})


@pytest.fixture(scope="module")
def experiment(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    made = make_experiment(tmp_path_factory.mktemp("reads") / "run")
    return replace(
        made,
        mine=MineConfig(),
        score=ScoreConfig(model=str(tiny_model)),
        evaluate=EvaluateConfig(),
        train=TrainConfig(per_device_train_batch_size=8),
    )


MATTERS = [
    *(("mine", model(query_instruction_for_retrieval="find: ")), ("mine", model(pooling="cls"))),
    *(("mine", section("mine", negative_number=3)), ("mine", section("data", passage_max_len=20))),
    *(("evaluate", model(passage_instruction_for_retrieval="p: ")), ("evaluate", model(normalize_embeddings=False))),
    *(("evaluate", section("evaluate", k_values=[7])), ("evaluate", lambda e: replace(e, seed=7))),
    *(("encode", model(query_instruction_for_retrieval="q: ")), ("encode", model(normalize_embeddings=False))),
    *(("score", section("score", pooling="mean")), ("score", section("score", query_instruction_for_retrieval="q: "))),
    *(("score", section("data", query_max_len=9)), ("score", section("score", max_len=9))),
    *(("train", section("train", temperature=0.5)), ("train", model(dropout=0.0))),
    ("train", section("train", deepspeed={"zero_optimization": {"stage": 1}})),
]
DOES_NOT = [
    ("mine", section("mine", use_gpu_for_searching=True)),
    ("mine", section("encode", queries_per_unit=7)),
    ("score", model(query_instruction_for_retrieval="the student's")),
    ("train", section("train", save_steps=3, logging_steps=1)),
    ("train", section("train", deepspeed={"zero_optimization": {"stage": 0}})),
]


@pytest.mark.parametrize(("job", "change"), MATTERS)
def test_what_the_result_depends_on_is_recorded(experiment: Experiment, job: str, change: Change) -> None:
    if job in ("evaluate", "encode"):
        experiment = replace(experiment, train=None)
    assert reads(job, change(experiment)) != reads(job, experiment)


@pytest.mark.parametrize(("job", "change"), DOES_NOT)
def test_what_it_does_not_depend_on_is_not(experiment: Experiment, job: str, change: Change) -> None:
    assert reads(job, change(experiment)) == reads(job, experiment)


def test_other_judgements_are_another_evaluation(make_experiment: MakeExperiment, beir: Path, tmp_path: Path) -> None:
    shutil.copytree(beir, tmp_path / "beir")
    made = make_experiment(tmp_path / "run")
    here = replace(made, data=replace(made.data, evaluation=str(tmp_path / "beir")))
    before = reads("evaluate", here)
    qrels = tmp_path / "beir" / "qrels" / "test.tsv"
    lines = qrels.read_text().splitlines()
    columns = [line.split("\t") for line in lines]
    columns[-1][1], columns[-2][1] = columns[-2][1], columns[-1][1]
    qrels.write_text("\n".join("\t".join(line) for line in columns) + "\n")
    assert reads("evaluate", here) != before
