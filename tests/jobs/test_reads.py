"""What a job's result depends on is in its record, and what it does not depend on is not: nothing stale is served."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig
from rayembed.config.mine import MineConfig
from rayembed.config.score import ScoreConfig
from rayembed.config.train import TrainConfig
from rayembed.jobs import encode, evaluate, mine, score
from rayembed.jobs.inputs import training_rows
from rayembed.jobs.rounds import rounds_of
from rayembed.jobs.train_reads import training_reads
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
        return training_reads(experiment, rows)
    return score.reads(experiment, rows)


def model(**changes: Any) -> Change:  # noqa: ANN401 - what YAML may hold
    return lambda experiment: replace(experiment, model=replace(experiment.model, **changes))


def section(name: str, **changes: Any) -> Change:  # noqa: ANN401
    return lambda experiment: replace(experiment, **{name: replace(getattr(experiment, name), **changes)})


def on_workers(number: int | tuple[int, int], **train: Any) -> Change:  # noqa: ANN401
    return lambda experiment: section("ray", num_workers=number, max_failures=1)(section("train", **train)(experiment))


@pytest.fixture(scope="module")
def experiment(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    made = make_experiment(tmp_path_factory.mktemp("reads") / "run")
    return replace(
        made,
        mine=MineConfig(),
        score=ScoreConfig(model=str(tiny_model), max_len=64),
        evaluate=EvaluateConfig(),
        train=TrainConfig(per_device_train_batch_size=8),
    )


MATTERS_IN_MINE: dict[str, Any] = {
    "range_for_sampling": "3-20",
    "sampling_strategy": "top",
    "fill_up": False,
    "min_score": 0.0,
    "max_score": 0.5,
    "absolute_margin": 0.1,
    "relative_margin": 0.05,
    "near_duplicate": 0.5,
    "max_uses": 3,
    "denoise": True,
}
DENOISING: dict[str, Any] = {"denoise_margin": 0.5, "denoise_max_score": 0.5, "denoise_candidates": 9}
MATTERS = [
    *(("mine", model(query_instruction_for_retrieval="find: ")), ("mine", model(pooling="cls"))),
    *(("mine", section("mine", negative_number=3)), ("mine", section("data", passage_max_len=20))),
    *(("mine", section("mine", **{name: value})) for name, value in MATTERS_IN_MINE.items()),
    *(("mine", section("search", backend=name)) for name in ("hnsw", "ivf")),
    *(("evaluate", model(passage_instruction_for_retrieval="p: ")), ("evaluate", model(normalize_embeddings=False))),
    *(("evaluate", section("evaluate", k_values=[7])), ("evaluate", lambda e: replace(e, seed=7))),
    *(("encode", model(query_instruction_for_retrieval="q: ")), ("encode", model(normalize_embeddings=False))),
    *(("score", section("score", pooling="mean")), ("score", section("score", query_instruction_for_retrieval="q: "))),
    *(("score", section("data", query_max_len=9)), ("score", section("score", max_len=9))),
    *(("train", section("train", temperature=0.5)), ("train", model(dropout=0.0))),
    ("train", section("train", deepspeed={"zero_optimization": {"stage": 1}})),
    *(("train", on_workers(2)), ("train", on_workers(2, global_batch_size=32))),
]
DOES_NOT = [
    ("mine", section("mine", use_gpu_for_searching=True)),
    ("mine", section("mine", margin_positive="highest", denoise_margin=0.5, denoise_candidates=9)),
    *(("mine", section("search", backend=name)) for name in ("flat", "torch")),
    ("mine", section("search", passages_per_index=9, passages_per_unit=9, queries_per_unit=9, recall_queries=9)),
    ("mine", section("search", ivf_probes=3, hnsw_neighbors=9)),
    *((job, lambda e: replace(e, cache_dir="/tmp/elsewhere")) for job in ("mine", "score", "evaluate", "encode")),
    ("mine", section("score", max_len=9)),
    ("mine", section("encode", queries_per_unit=7)),
    ("score", model(query_instruction_for_retrieval="the student's")),
    ("train", section("train", save_steps=3, save_minutes=5, logging_steps=1, save_best=True)),
    ("train", on_workers((1, 2), global_batch_size=8)),
    *(("train", on_workers(2, global_batch_size=8)), ("train", on_workers(2, per_device_train_batch_size=4))),
    ("train", section("train", deepspeed={"zero_optimization": {"stage": 0}})),
]


@pytest.mark.parametrize(("job", "change"), MATTERS)
def test_what_the_result_depends_on_is_recorded(experiment: Experiment, job: str, change: Change) -> None:
    if job in ("evaluate", "encode"):
        experiment = replace(experiment, train=None)
    assert reads(job, change(experiment)) != reads(job, experiment)


@pytest.mark.parametrize(("job", "change"), DOES_NOT)
def test_what_it_does_not_depend_on_is_not(experiment: Experiment, job: str, change: Change) -> None:
    if job in ("evaluate", "encode"):
        experiment = replace(experiment, train=None)
    assert reads(job, change(experiment)) == reads(job, experiment)


@pytest.mark.parametrize("margin", [{"denoise": True}, {"absolute_margin": 0.1}, {"relative_margin": 0.1}])
def test_which_positive_margins_are_measured_from_is_recorded(experiment: Experiment, margin: dict[str, Any]) -> None:
    with_margin = section("mine", **margin)(experiment)
    assert reads("mine", section("mine", margin_positive="highest")(with_margin)) != reads("mine", with_margin)


def test_the_first_of_several_rounds_is_recorded_as_one_alone(experiment: Experiment) -> None:
    assert experiment.train is not None
    several = section("mine", rounds=3)(experiment)
    assert reads("mine", rounds_of(several)[0].trains) == reads("mine", experiment)


@pytest.mark.parametrize("change", [section("mine", **{name: value}) for name, value in DENOISING.items()])
def test_what_denoising_depends_on_is_recorded(experiment: Experiment, change: Change) -> None:
    denoised = section("mine", denoise=True)(experiment)
    assert reads("mine", change(denoised)) != reads("mine", denoised)


def test_the_teacher_that_denoises_is_recorded(experiment: Experiment, tiny_model: Path, tmp_path: Path) -> None:
    denoised = section("mine", denoise=True)(experiment)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    assert reads("mine", section("score", model=str(other))(denoised)) == reads("mine", denoised), "the same weights"
    with (other / "model.safetensors").open("ab") as file:
        file.write(b" ")
    changed = section("score", model=str(other))
    assert reads("mine", changed(denoised)) != reads("mine", denoised)
    assert reads("mine", changed(experiment)) == reads("mine", experiment), "who judges nothing does not matter"
    assert reads("mine", section("score", max_len=9)(denoised)) != reads("mine", denoised)


@pytest.mark.parametrize(
    "change", [{"hnsw_neighbors": 9}, {"hnsw_ef_search": 9}, {"passages_per_index": 9}, {"hnsw_ef_construction": 9}]
)
def test_settings_of_an_approximate_search_are_recorded(experiment: Experiment, change: dict[str, Any]) -> None:
    approximate = section("search", backend="hnsw")(experiment)
    assert reads("mine", section("search", **change)(approximate)) != reads("mine", approximate)


@pytest.mark.parametrize("change", [{"queries_per_unit": 9}, {"passages_per_unit": 9}, {"recall_queries": 9}])
def test_how_an_approximate_search_is_cut_is_not(experiment: Experiment, change: dict[str, Any]) -> None:
    approximate = section("search", backend="hnsw")(experiment)
    assert reads("mine", section("search", **change)(approximate)) == reads("mine", approximate)


def test_given_embeddings_are_recorded_by_their_files(experiment: Experiment, tmp_path: Path) -> None:
    data = mine._data(experiment)
    rows, corpus = data.rows, data.corpus
    found = []
    for setting, store in (("corpus_embeddings", corpus), ("query_embeddings", rows)):
        for value in (1, 2):
            file = tmp_path / f"{setting}-{value}.npy"
            np.save(file, np.full((store.num_rows, 64), value, np.float32))
            found.append(reads("mine", section("mine", **{setting: [str(file)]})(experiment)))
    found.append(reads("mine", experiment))
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


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
