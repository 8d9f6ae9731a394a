"""The job score with both kinds of teacher, against every pair scored alone; with a real Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayembed.jobs import score
from rayembed.jobs.pairs import score_pairs
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_data import read_lines
from tests.jobs.toy_pairs import write_source

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Rows with one to three positives, three negatives and passages that come back; 11 different pairs of 12."""
    rows = [
        {
            "query": "baba didi",
            "pos": ["baba didi kuku"],
            "neg": ["lolo", "momo nana", "pepe ruru lolo momo"],
            "pos_ids": ["p1"],
        },
        {"query": "lolo", "pos": ["lolo momo", "lolo"], "neg": ["baba didi kuku", "pepe"], "prompt": "Find: "},
        {"query": "baba didi", "pos": ["baba"], "neg": ["momo nana", "kuku", "ruru"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def scored(
    make_experiment: MakeExperiment, rows_file: Path, **teacher: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and stats of a run in one unit."""
    experiment = make_experiment(
        rows_file.parent / "run",
        data={"train": [str(rows_file)], "corpus": []},
        score={**teacher, "max_len": 64},
    )
    folder = score.run(experiment)
    return read_lines(folder), json.loads((folder / "stats.json").read_text())


def check_stats(stats: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> None:
    positives = [score for row in rows for score in row["pos_scores"]]
    negatives = [score for row in rows for score in row["neg_scores"]]
    assert (stats["kind"], stats["rows"]) == (kind, 3)
    assert (stats["pairs"], stats["different_pairs"]) == (12, 11), "a pair that is in two rows is scored once"
    of_sides = (stats["positive_scores"], positives), (stats["negative_scores"], negatives)
    for found, scores in of_sides:
        assert (found["count"], found["min"], found["max"]) == (len(scores), min(scores), max(scores))
        assert found["std"] == pytest.approx(np.std(scores))
    assert stats["mean_positive_score"] == pytest.approx(np.mean(positives))
    assert stats["mean_negative_score"] == pytest.approx(np.mean(negatives))
    agreed = sum(max(row["pos_scores"]) >= max(row["neg_scores"]) for row in rows)
    assert stats["rows_with_a_positive_on_top"] == agreed
    assert stats["share_of_rows_with_a_positive_on_top"] == pytest.approx(agreed / 3)
    assert stats["warnings"] == []


@torch.inference_mode()
def test_a_reranker_gives_the_logit_of_every_pair(
    make_experiment: MakeExperiment, rows_file: Path, tiny_reranker: Path
) -> None:
    rows, stats = scored(make_experiment, rows_file, model=str(tiny_reranker))
    tokenizer = AutoTokenizer.from_pretrained(tiny_reranker)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reranker).eval()
    for row, given in zip(rows, read_lines(rows_file), strict=True):
        assert {name: row[name] for name in given} == given, "the rows are as they were"
        texts = row["pos"] + row["neg"]
        alone = [model(**tokenizer(row["query"], text, return_tensors="pt")).logits.item() for text in texts]
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(alone, abs=1e-5)
    check_stats(stats, rows, "reranker")
    assert stats["taken_from_cache"] == 0


def test_what_another_job_scored_is_taken_from_the_cache(
    make_experiment: MakeExperiment, rows_file: Path, tiny_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_experiment(
        rows_file.parent / "run",
        data={"train": [str(rows_file)], "corpus": []},
        score={"model": str(tiny_reranker), "max_len": 64},
    )
    assert "3 rows" in score.plan(experiment)
    assert "at most 12 pairs" in score.plan(experiment)
    mined = [[("baba didi", "lolo"), ("lolo", "lolo"), ("lolo", "didi")]]
    before = score_pairs(experiment, write_source(rows_file.parent / "mined.json", mined), what="judge").lookup(
        mined[0]
    )
    own = score.run_units
    monkeypatch.setattr(score, "run_units", lambda *_, **__: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        score.run(experiment)
    monkeypatch.setattr(score, "run_units", own)
    rows, stats = read_lines(score.run(experiment)), json.loads((rows_file.parent / "run/score/stats.json").read_text())
    assert (stats["different_pairs"], stats["taken_from_cache"]) == (11, 2), "as if the job had not been killed"
    assert (rows[0]["neg_scores"][0], rows[1]["pos_scores"][1]) == tuple(before[:2].tolist())


def test_an_embedder_gives_inner_products(make_experiment: MakeExperiment, rows_file: Path, tiny_model: Path) -> None:
    rows, stats = scored(make_experiment, rows_file, model=str(tiny_model), pooling="mean")
    for row in rows:
        products = vectors(tiny_model, row["pos"] + row["neg"], 64) @ vectors(tiny_model, [row["query"]], 24)[0]
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(products.tolist(), abs=1e-5)
    check_stats(stats, rows, "embedder")
