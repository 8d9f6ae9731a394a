"""Retrieval, scored pairs, classification and clustering trained together, each in batches of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayembed.config import Experiment
from rayembed.jobs import check, train
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.toy_data import write_rows

WORDS = ["baba", "didi", "gugu", "koko", "lala", "momo", "nene", "pipi"]


def write_tasks(beir: Path, folder: Path) -> list[str]:
    """Files in the four formats, named as in the wish that the formats came from."""
    for name in ("sts", "classification-no_in_batch_neg", "clustering-no_in_batch_neg"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    pairs, labelled = [], []
    for _ in range(32):
        first, second = (rng.choice(WORDS, 4, replace=False).tolist() for _ in range(2))
        shared = len({*first} & {*second}) / 4
        pairs.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "score": shared})
        label = int(rng.integers(4))
        others = rng.choice(WORDS, 3).tolist()
        labelled.append({"text": " ".join([WORDS[label], *others]), "label": f"about {WORDS[label]}"})
    files: dict[str, list[dict[str, Any]]] = {
        "sts/sts.jsonl": pairs,
        "classification-no_in_batch_neg/train.jsonl": labelled,
        "clustering-no_in_batch_neg/train.jsonl": labelled[::-1],
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(write_rows(beir, folder / "retrieval.jsonl")), *(str(folder / name) for name in files)]


@pytest.fixture(scope="module")
def mixed(make_experiment: MakeExperiment, beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("tasks")
    files = write_tasks(beir, folder / "data")
    config = {"train": files, "corpus": [], "mixing": "round_robin", "datasets": [{"name": "*sts*", "loss": "angle"}]}
    return make_experiment(
        folder / "run",
        data=config,
        train={**TRAIN, "global_batch_size": 8},
        export={"probe_texts": 8},
        ray={"num_workers": 2},
    )


@pytest.mark.ray
def test_all_of_them_are_learned_from(mixed: Experiment, local_ray: None) -> None:
    text = check.run(mixed).read_text()
    for kind in ("type sts", "type class"):
        assert kind in text
    train.run(mixed)
    lines = (Path(mixed.output_dir) / "train" / "metrics.jsonl").read_text().splitlines()
    figures = [json.loads(line) for line in lines]
    negatives = {line["negatives_per_query"] for line in figures}
    assert negatives == {8 * 3 - 1, 0, 3 - 1}, "in the batch, of scored pairs, in the own group"
    for kind in negatives:
        losses = [line["loss"] for line in figures if line["negatives_per_query"] == kind]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]), kind
    assert (Path(mixed.output_dir) / "model" / "model.safetensors").is_file()
