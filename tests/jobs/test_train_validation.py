"""Evaluation on the dev split while training goes on: the figures of the job `evaluate`, and what is refused early."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
import torch.distributed as dist

from rayembed.config import Experiment
from rayembed.config.train import TrainConfig
from rayembed.data.problems import DataError
from rayembed.data.store import Store
from rayembed.data.tokens import TextTokens
from rayembed.jobs import check, evaluate, train
from rayembed.jobs.checkpoints import NOT_EVALUATED, SCORE, CheckpointError, Checkpoints, best_in_words, kept
from rayembed.jobs.dev_split import DevSplit, dev_split, notes
from rayembed.jobs.inputs import training_rows
from rayembed.jobs.tokenize import tokenize_rows
from rayembed.jobs.train_reads import training_reads
from rayembed.models.loading import tokenizer_of
from rayembed.training.loop import Worker
from rayembed.training.loop import train as train_here
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.toy_data import NUM_PASSAGES, NUM_TEST, read_lines, write_beir, write_rows
from tests.jobs.without_ray import do_units_here
from tests.small_models import decoder_folder
from tests.training.processes import in_workers

Make = Callable[..., Experiment]


@pytest.fixture(scope="module")
def dev_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data whose test queries are those of the dev split, and half of them those of the test split."""
    folder = write_beir(tmp_path_factory.mktemp("data") / "toy")
    shutil.copy(folder / "qrels" / "test.tsv", folder / "qrels" / "dev.tsv")
    lines = (folder / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (folder / "qrels" / "test.tsv").write_text("".join(lines[: len(lines) // 2]))
    return folder


@pytest.fixture
def make(make_experiment: MakeExperiment, dev_data: Path, tmp_path: Path) -> Make:
    """An experiment of 10 steps that is evaluated; arguments are settings of its sections."""
    rows = write_rows(dev_data, tmp_path / "rows.jsonl")

    def made(name: str = "run", data: dict[str, Any] | None = None, **given: Any) -> Experiment:  # noqa: ANN401
        settings: dict[str, Any] = {**TRAIN, "eval_steps": 4, **given.pop("train", {})}
        of_data = {"train": [str(rows)], "corpus": [], "evaluation": str(dev_data), **(data or {})}
        return make_experiment(tmp_path / name, data=of_data, train=settings, **given)

    return made


def rows_and_dev(experiment: Experiment) -> tuple[Store, DevSplit]:
    dev = dev_split(experiment)
    assert dev is not None
    return training_rows(experiment, after=())[0], dev


def trained_here(experiment: Experiment, tokens: Path, parts: tuple[str, ...], rows: Path, dev: Path) -> None:
    """The job's worker without Ray."""
    out = Path(experiment.output_dir)
    worker = Worker(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cpu"),
        rows=rows,
        tokens=tokens,
        parts=parts,
        train_folder=out / "train",
        model_folder=out / "model",
        probe_texts=(("baba", "dodo"),),
        dev=dev,
        checkpoint_of=lambda step: nullcontext(out / f"step-{step}"),
    )
    train_here(experiment, worker, resume_from=None, checkpoint=lambda engine, state, *_: None)


OTHERS: dict[str, dict[str, Any]] = {  # families beside encoder, whose queries or vectors are made otherwise
    "m3": {"m3": {"colbert_dim": 16}},
    "decoder": {"lora": {"lora_rank": 4}},
    "icl": {
        "model": {"query_instruction_for_retrieval": "b "},
        "icl": {
            "icl_suffix_str": " b",
            "examples_max_len": 64,
            "max_examples": 1,
            "examples_for_task": [{"query": "baba didi", "response": "didi lala"}],
        },
    },
}

STAGES = {"m3": 3, "decoder": 0, "icl": 2}


@pytest.mark.parametrize(
    ("workers", "stage", "family"),
    [
        *((1, 0, "encoder"), (2, 3, "encoder")),
        *(
            pytest.param(2, stage, family, marks=pytest.mark.long)
            for stage, family in zip((3, 0, 2), OTHERS, strict=True)
        ),
    ],
)
def test_figures_are_those_of_the_job_evaluate(
    make: Make, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, workers: int, stage: int, family: str
) -> None:
    do_units_here(monkeypatch)
    own = OTHERS.get(family, {})
    base = decoder_folder(tmp_path / "llama", "llama", "[CLS]") if family in ("decoder", "icl") else tiny_model
    of_model = {
        "name_or_path": str(base),
        "family": family,
        "pooling": None,
        "query_instruction_for_retrieval": "find: ",
    }
    zero = {
        "stage": stage,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }  # or weights stay whole
    experiment = make(
        train={"deepspeed": {"zero_optimization": zero}, "adam_epsilon": 1e-8},
        encode={"query_max_len": 14, "tokens_per_batch": 512},
        ray={"num_workers": workers},
        **{**own, "model": {**of_model, **own.get("model", {})}},
    )
    rows, dev = rows_and_dev(experiment)
    tokens = tokenize_rows(experiment, rows, dev)
    in_workers(workers, trained_here, experiment, tokens.folder, tokens.parts, rows.folder, dev.folder)
    lines = read_lines(Path(experiment.output_dir) / "train" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 4, 8, 10]
    evaluate.run(replace(experiment, data=replace(experiment.data, evaluation_split="dev")))
    found = json.loads((Path(experiment.output_dir) / "evaluate" / "metrics.json").read_text())
    for name, line in (("base", lines[0]), ("tuned", lines[-1])):
        assert {*line["eval"]} == {f"{metric}@10" for metric in ("ndcg", "map", "recall", "precision", "mrr")}
        assert line["eval"] == pytest.approx({key: found[name][key] for key in line["eval"]}, abs=1e-6), name
    assert lines[0]["eval"] != lines[-1]["eval"], "it was trained"
    assert lines[0]["of"] == f"{NUM_TEST} queries of split dev against all {NUM_PASSAGES} passages"
    assert [lines[0][key] for key in ("queries", "passages", "corpus")] == [NUM_TEST, NUM_PASSAGES, NUM_PASSAGES]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_job_stops_early_and_writes_the_best_model(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    do_units_here(monkeypatch)  # all but the training
    settings = {
        **{"early_stopping_patience": 2, "load_best_model_at_end": True, "save_best": True, "save_total_limit": 1},
        **{"eval_steps": 1, "metric_for_best_model": "mrr@5", "num_train_epochs": 20, "learning_rate": 0.02},
    }
    experiment = make(train=settings, ray={"num_workers": 2})
    with caplog.at_level(logging.INFO, "rayembed"):
        train.run(experiment)
    out = Path(experiment.output_dir)
    lines = read_lines(out / "train" / "evaluations.jsonl")
    figures = [line["eval"]["mrr@5"] for line in lines]
    best = int(np.argmax(figures))
    assert 0 < best == len(lines) - 3, f"chosen so that a step is the best: {figures}"
    assert lines[-1]["stopped_early"]
    assert lines[-1]["model_step"] == best
    assert [line["step"] for line in read_lines(out / "train" / "metrics.jsonl")] == [*range(1, len(lines))]
    snapshot = json.loads((out / "train" / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    (one,) = snapshot["checkpoint_results"]
    assert one["metrics"]["step"] == best
    assert one["metrics"]["mrr@5"] == figures[best]
    assert one["metrics"][SCORE] == pytest.approx(figures[best])
    assert f"the best checkpoint has the mrr@5 {figures[best]:.4f}" in caplog.text
    again = replace(experiment, data=replace(experiment.data, evaluation_split="dev"), evaluate=None)
    evaluate.run(again)
    found = json.loads((out / "evaluate" / "metrics.json").read_text())
    assert found["tuned"]["mrr@5"] == pytest.approx(figures[best], abs=1e-6)


def test_a_sample_has_the_judged_passages_and_others_by_the_seed(make: Make) -> None:
    experiment = make(train={"eval_passages": 50, "eval_queries": 8, "metric_for_best_model": "ndcg@50"})
    _, dev = rows_and_dev(experiment)
    assert len(dev.judgements) == dev.num_texts("query") == 8
    assert [*dev.judgements] == [name for name in dev.evaluation.qrels if name in dev.judgements], "in their order"
    rows = dev.rows["passage"]
    assert rows is not None
    assert len(rows) == len({*rows.tolist()}) == 50
    assert sorted(rows) == rows.tolist()
    judged = {name for own in dev.judgements.values() for name in own}
    names = dev.evaluation.corpus.take(rows, ["id"]).column("id").to_pylist()
    assert judged <= {*names}
    assert max(rows) > 100, "drawn from all of the corpus"
    assert dev.words == (
        "8 of 20 queries of split dev against 50 of 120 passages (the judged ones and others drawn: higher than on all)"
    )
    _, same = rows_and_dev(experiment)
    assert same.folder == dev.folder
    _, other = rows_and_dev(replace(experiment, seed=1))
    assert other.rows["passage"] is not None
    assert other.rows["passage"].tolist() != rows.tolist()
    assert other.judgements.keys() != dev.judgements.keys()
    assert other.folder != dev.folder


def test_a_sample_depends_on_the_data_alone(make: Make, dev_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev_data, tmp_path / "beir")
    lines = (folder / "qrels" / "dev.tsv").read_text().splitlines()
    (folder / "qrels" / "dev.tsv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    asked = {"eval_queries": 8, "eval_passages": 50}
    _, dev = rows_and_dev(make(train=asked))
    _, other = rows_and_dev(make(train=asked, data={"evaluation": str(folder)}))
    assert other.judgements == dev.judgements
    assert [*other.judgements] != [*dev.judgements], "or the order of the file is the same"

    alone = make(train={"eval_passages": 50})
    drawn = [rows_and_dev(found)[1].rows["passage"] for found in (alone, replace(alone, seed=1))]
    assert not np.array_equal(*drawn), "other passages for the same queries"  # type: ignore[arg-type]
    assert rows_and_dev(make(train={"eval_passages": 60}))[1].folder != rows_and_dev(alone)[1].folder


def test_all_passages_are_no_sample(make: Make) -> None:
    _, dev = rows_and_dev(make(train={"eval_passages": NUM_PASSAGES, "eval_queries": NUM_TEST}))
    assert dev.rows["passage"] is None
    assert dev.words == "20 queries of split dev against all 120 passages"


def test_tokens_are_of_the_texts_that_were_chosen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    done = do_units_here(monkeypatch)
    monkeypatch.setattr("rayembed.jobs.dev_split.TEXTS_PER_UNIT", 16)
    experiment = make(train={"eval_passages": 50}, model={"passage_instruction_for_retrieval": "text: "})
    rows, dev = rows_and_dev(experiment)
    tokenize_rows(experiment, rows, dev)
    assert len([name for name in done if len(name.split()[-1]) == 12]) == 2 + 4, "units of 16 texts"
    chosen = dev.rows["passage"]
    assert chosen is not None
    found = TextTokens(dev.folder / "passage")
    assert len(found) == 50
    names = dev.evaluation.corpus.take(chosen, ["id"]).column("id").to_pylist()
    assert found.ids(np.arange(50)).tolist() == names
    texts = dev.evaluation.corpus.take(chosen, ["text"]).column("text").to_pylist()
    tokenizer = tokenizer_of(experiment.model)
    expected = tokenizer([f"text: {text}" for text in texts], truncation=True, max_length=48)["input_ids"]
    assert [own.tolist() for own in found.block(10, 50)] == expected[10:]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"dev_split": "validation"}, r"qrels/validation\.tsv, which is not there; write it, or set data\.dev_split"),
    ({"eval_passages": 10}, {}, "train.eval_passages is 10, and 20 passages are judged for the 20 queries"),
    ({"metric_for_best_model": "ndcg@121"}, {}, "there are 120 passages to rank; choose at most @120"),
    ({"eval_passages": 60, "metric_for_best_model": "mrr@61"}, {}, "there are 60 passages to rank"),
]


@pytest.mark.parametrize(("of_train", "of_data", "reason"), REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_a_worker_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch, of_train: dict[str, Any], of_data: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("training was started"))
    experiment = make(train=of_train, data=of_data)
    for call in (train.run, train.plan):
        with pytest.raises(ValueError, match=reason):
            call(experiment)


def test_a_judgement_without_its_text_is_refused(make: Make, dev_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev_data, tmp_path / "beir")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq080\tp999\t1\n")
    with pytest.raises(DataError, match=r"dev\.tsv:2.*'p999' is not in"):
        train.plan(make(data={"evaluation": str(folder)}))


def test_queries_that_are_trained_on_are_told(make: Make, dev_data: Path, tmp_path: Path) -> None:
    experiment = make()
    rows, dev = rows_and_dev(experiment)
    assert notes(experiment, dev, rows) == []
    folder = shutil.copytree(dev_data, tmp_path / "beir")
    shutil.copy(folder / "qrels" / "train.tsv", folder / "qrels" / "dev.tsv")
    shared = make(data={"evaluation": str(folder), "evaluation_split": "dev"}, train={"eval_queries": 30})
    rows, dev = rows_and_dev(shared)
    first, second = notes(shared, dev, rows)
    assert first.startswith("warning: 30 of the 30 queries of qrels/dev.tsv are among the training rows too")
    assert second.startswith("warning: data.dev_split and data.evaluation_split are both 'dev'")


def test_the_job_check_reads_the_dev_split_too(make: Make, dev_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev_data, tmp_path / "beir")
    lines = check.run(make(data={"evaluation": str(folder)})).read_text().splitlines()
    assert "dev split: 20 queries of split dev against all 120 passages" in lines
    shutil.copy(folder / "qrels" / "train.tsv", folder / "qrels" / "dev.tsv")
    text = check.run(make(data={"evaluation": str(folder)})).read_text()
    assert "warning: 80 of the 80 queries of qrels/dev.tsv are among the training rows too" in text
    (folder / "qrels" / "dev.tsv").unlink()
    with pytest.raises(ValueError, match=r"dev\.tsv, which is not there"):
        check.run(make(data={"evaluation": str(folder)}))


def test_the_plan_says_what_is_evaluated_and_held(make: Make) -> None:
    plan = train.plan(make(ray={"num_workers": 2}))
    held = 4 * 64 * (NUM_TEST + NUM_PASSAGES // 2) + 12 * 10 * NUM_TEST * 11
    assert f"20 queries of split dev against all 120 passages, with {held / 1e6:,.1f} MB a worker" in plan
    assert "evaluated 4 times by ndcg@10" in plan
    assert "evaluated" not in train.plan(make(train={"eval_steps": None}))
    assert "evaluated at most 4 times" in train.plan(make(train={"early_stopping_patience": 2}))


def test_the_record_knows_evaluations_where_the_model_depends_on_them(make: Make) -> None:
    def reads(data: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:  # noqa: ANN401 - of section train
        experiment = make(train=settings, data=data)
        return training_reads(experiment, training_rows(experiment, after=())[0], dev_split(experiment))

    plain = reads(eval_steps=None)
    assert reads() == reads(eval_queries=5, eval_passages=50) == plain
    stops = reads(early_stopping_patience=2)
    assert stops != plain
    for change in ({"eval_steps": 5}, {"eval_queries": 5}, {"metric_for_best_model": "mrr@10"}):
        assert reads(early_stopping_patience=2, **change) != stops, change
    assert reads(early_stopping_patience=2, data={"dev_split": "test"}) != stops
    assert plain != reads(load_best_model_at_end=True) != stops


class Reports:
    """In place of Ray: what is reported, and as what it is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.names: list[str | None] = []
        self._folder = folder
        monkeypatch.setattr(ray.train, "report", self.report)
        monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", self.reported)
        monkeypatch.setattr(ray.train.collective, "barrier", lambda: None)
        monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: self))

    def persist_current_checkpoint(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        (self._folder / name).mkdir(parents=True)
        return ray.train.Checkpoint(str(self._folder / name))

    def report(self, metrics: dict[str, Any], checkpoint: object = None, **how: Any) -> None:  # noqa: ANN401
        self.metrics.append(metrics)
        self.names.append(how.get("checkpoint_dir_name"))
        if checkpoint is not None:
            how["checkpoint_upload_fn"](checkpoint, self.names[-1])

    def reported(self, **_: object) -> list[SimpleNamespace]:
        found = [(metrics, name) for metrics, name in zip(self.metrics, self.names, strict=True) if name is not None]
        return [
            SimpleNamespace(metrics=metrics, checkpoint=ray.train.Checkpoint(str(self._folder / name)))
            for metrics, name in found
        ]


def test_ray_is_told_of_evaluations_and_of_equal_ones_keeps_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports = Reports(monkeypatch, tmp_path)
    checkpoints = Checkpoints(tmp_path, timeout_s=1, metric="ndcg@10", resumed_from="step-00000002")
    engine: Any = SimpleNamespace(save=lambda *_: None)
    checkpoints.tell({"step": 0, "ndcg@10": 0.5})
    checkpoints.save(engine, {"step": 2}, 1.0, {"ndcg@10": 0.75})
    checkpoints.save(engine, {"step": 3}, 1.0, None)
    checkpoints.save(engine, {"step": 4}, 1.0, {"ndcg@10": 0.75})
    assert reports.names == [None, "step-00000002-evaluated", "step-00000003", "step-00000004"]
    assert reports.metrics[0] == {"step": 0, "ndcg@10": 0.5}
    assert [found.get("ndcg@10") for found in reports.metrics] == [0.5, 0.75, None, 0.75]
    scores = [found[SCORE] for found in reports.metrics[1:]]
    assert scores[1] == NOT_EVALUATED
    assert scores[0] > scores[2] == pytest.approx(0.75)
    with checkpoints.of_evaluation(2) as folder:
        assert folder == tmp_path / "step-00000002-evaluated"
    with pytest.raises(CheckpointError, match="step 3, the best evaluation's, is not in"), checkpoints.of_evaluation(3):
        pass


def test_checkpoints_are_kept_by_the_metric_where_there_is_one() -> None:
    for settings in ({"save_best": True}, {"load_best_model_at_end": True}):
        found = kept(TrainConfig(eval_steps=5, save_total_limit=3, **settings))
        assert (found.num_to_keep, found.checkpoint_score_attribute, found.checkpoint_score_order) == (3, SCORE, "max")
    assert kept(TrainConfig(eval_steps=5)).checkpoint_score_attribute is None, "the last ones"


def test_the_best_by_the_metric_is_named(tmp_path: Path) -> None:
    values = {2: 0.5, 4: 0.75, 6: 0.75}
    found: Any = [
        (ray.train.Checkpoint(f"/x/step-{step}"), {"loss": 1.0, SCORE: value - step * 1e-15, "mrr@10": value})
        for step, value in values.items()
    ]
    found.append((ray.train.Checkpoint("/x/step-7"), {"loss": 1.0, SCORE: NOT_EVALUATED}))
    result = ray.train.Result(metrics=None, checkpoint=None, error=None, path="", best_checkpoints=found)
    words = best_in_words(result, tmp_path / "train", "mrr@10")
    assert words.endswith(f"has the mrr@10 0.7500 on the dev split: {tmp_path}/train/checkpoints/step-4")
    none = ray.train.Result(metrics=None, checkpoint=None, error=None, path="", best_checkpoints=found[-1:])
    assert "no evaluation was better" in best_in_words(none, tmp_path, "mrr@10")
