"""The job evaluate against rankings by numpy under trec_eval itself; with a real Ray."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import pytrec_eval

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig
from rayembed.evaluation.trec import read_run
from rayembed.jobs import evaluate
from rayembed.jobs.folders import ChangedError
from tests.jobs.reference_ranking import rankings
from tests.jobs.toy_data import NUM_TEST, NUM_TRAIN, read_lines, read_texts

pytestmark = pytest.mark.ray
MEASURES = {"ndcg@10": "ndcg_cut_10", "map@100": "map_cut_100", "recall@10": "recall_10", "precision@5": "P_5"}


def qrels(beir: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for line in (beir / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, passage, grade = line.split("\t")
        found.setdefault(query, {})[passage] = int(grade)
    return found


def reference(model: Path, beir: Path) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The whole ranking of every test query, and means of trec_eval's measures over them."""
    queries = dict(list(read_texts(beir / "queries.jsonl").items())[NUM_TRAIN:])
    ranked = rankings(model, queries, read_texts(beir / "corpus.jsonl"), (24, 48))
    runs = {query: {name: float(-i) for i, name in enumerate(ranking)} for query, ranking in ranked.items()}
    values = pytrec_eval.RelevanceEvaluator(qrels(beir), {*MEASURES.values(), "recip_rank"}).evaluate(runs)
    means = {ours: sum(value[theirs] for value in values.values()) / NUM_TEST for ours, theirs in MEASURES.items()}
    return ranked, means


def folder_of(experiment: Experiment) -> Path:
    return Path(experiment.output_dir) / "evaluate"


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_means_and_runs_are_those_of_brute_force(
    name: str, evaluated: Experiment, tiny_model: Path, beir: Path
) -> None:
    model = {"base": tiny_model, "tuned": Path(evaluated.output_dir) / "model"}[name]
    ranked, means = reference(model, beir)
    metrics = json.loads((folder_of(evaluated) / "metrics.json").read_text())
    assert {key: metrics[name][key] for key in means} == pytest.approx(means, abs=1e-6)
    assert (metrics["num_queries"], metrics["num_passages"]) == (NUM_TEST, 120)
    run = read_run(folder_of(evaluated) / f"{name}.trec")
    assert run.keys() == ranked.keys()
    assert all(len(ranking) == 100 for ranking in run.values())
    first = {query: [passage for passage, _ in ranking[:10]] for query, ranking in run.items()}
    assert first == {query: ranking[:10] for query, ranking in ranked.items()}


def test_both_models_are_compared_query_by_query(evaluated: Experiment) -> None:
    metrics = json.loads((folder_of(evaluated) / "metrics.json").read_text())
    found = metrics["significance"]
    lines = read_lines(folder_of(evaluated) / "per_query.jsonl")
    assert len(lines) == found["num_queries"] == NUM_TEST
    assert found["base"] == pytest.approx(metrics["base"]["ndcg@10"])
    assert found["tuned"] == pytest.approx(metrics["tuned"]["ndcg@10"])
    assert found["wins"] == sum(line["tuned"] > line["base"] for line in lines)
    assert found["losses"] == sum(line["tuned"] < line["base"] for line in lines)
    assert 0 < found["p_value"] <= 1
    for line in lines:
        assert line["base_top"]["relevant"] == (line["base_top"]["text"] in line["positives"])


def test_without_a_tuned_model_the_base_is_evaluated_alone(
    evaluated: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(evaluated.output_dir) / "cache", tmp_path / "run" / "cache")
    monkeypatch.setattr("rayembed.jobs.units._stream", lambda *_: pytest.fail("a worker was started"))
    alone = replace(evaluated, output_dir=str(tmp_path / "run"), train=None)
    metrics = json.loads((evaluate.run(alone) / "metrics.json").read_text())
    assert metrics["base"] == json.loads((folder_of(evaluated) / "metrics.json").read_text())["base"]
    assert not {"tuned", "significance"} & metrics.keys()
    assert "no tuned model yet" in evaluate.summary(folder_of(alone))


def test_a_missing_model_is_refused_where_the_experiment_trains_one(evaluated: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run/model is not there.*run `rayembed train` first"):
        evaluate.run(replace(evaluated, output_dir=str(tmp_path / "run")))


def test_other_cut_offs_need_overwrite(evaluated: Experiment, tmp_path: Path) -> None:
    shutil.copytree(evaluated.output_dir, tmp_path / "run")
    section = EvaluateConfig(k_values=[7])
    other = replace(evaluated, output_dir=str(tmp_path / "run"), evaluate=section)
    with pytest.raises(ChangedError, match=r"k_values: was .*100.*, is .*7"):
        evaluate.run(other)
    metrics = json.loads((evaluate.run(other, overwrite=True) / "metrics.json").read_text())
    assert "ndcg@7" in metrics["base"]
    assert "ndcg@100" not in metrics["base"]
