"""The job score with both kinds of teacher, against every pair scored alone; with a real Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayembed.jobs import score
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_data import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Rows with one to three positives, three negatives and passages that come back; 11 different pairs of 12."""
    rows = [
        {"query": "baba didi", "pos": ["baba didi kuku"], "neg": ["lolo", "momo nana", "pepe ruru lolo momo"]},
        {"query": "lolo", "pos": ["lolo momo", "lolo"], "neg": ["baba didi kuku", "pepe"]},
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
    assert stats["different_pairs"] == 11, "the pair of a query and a passage in two rows is scored once"
    assert stats["mean_positive_score"] == pytest.approx(np.mean(positives))
    assert stats["mean_negative_score"] == pytest.approx(np.mean(negatives))
    agreed = sum(max(row["pos_scores"]) >= max(row["neg_scores"]) for row in rows)
    assert stats["rows_with_a_positive_on_top"] == agreed


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


def test_an_embedder_gives_inner_products(make_experiment: MakeExperiment, rows_file: Path, tiny_model: Path) -> None:
    rows, stats = scored(make_experiment, rows_file, model=str(tiny_model), pooling="mean")
    for row in rows:
        products = vectors(tiny_model, row["pos"] + row["neg"], 64) @ vectors(tiny_model, [row["query"]], 24)[0]
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(products.tolist(), abs=1e-5)
    check_stats(stats, rows, "embedder")
