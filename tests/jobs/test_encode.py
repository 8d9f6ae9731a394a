"""The job encode: vectors as parquet, from the cache where it has them and never from one of other weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from rayembed.config import Experiment
from rayembed.jobs import encode
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_data import NUM_PASSAGES, NUM_TRAIN, read_texts

pytestmark = pytest.mark.ray


def read(folder: Path) -> tuple[list[str], NDArray[np.float32]]:
    table = pq.read_table(folder)
    return table.column("id").to_pylist(), np.array(table.column("vector").to_pylist(), np.float32)


@pytest.fixture
def copied(evaluated: Experiment, tmp_path: Path, beir: Path) -> Experiment:
    """The run folder of an evaluation, with its model and its vectors."""
    shutil.copytree(evaluated.output_dir, tmp_path / "run")
    return replace(evaluated, output_dir=str(tmp_path / "run"))


def test_vectors_of_the_tuned_model_come_from_the_cache(
    copied: Experiment, beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayembed.jobs.units._stream", lambda *_: pytest.fail("a worker was started"))
    folder = encode.run(copied)
    model = Path(copied.output_dir) / "model"
    passages, queries = read_texts(beir / "corpus.jsonl"), read_texts(beir / "queries.jsonl")
    ids, found = read(folder / "passages")
    assert ids == list(passages)
    assert len(list((folder / "passages").iterdir())) == -(-NUM_PASSAGES // copied.encode.passages_per_unit)
    np.testing.assert_allclose(found, vectors(model, list(passages.values()), 48), atol=1e-5)
    ids, found = read(folder / "queries")
    assert ids == list(queries)[NUM_TRAIN:], "those that are judged"
    np.testing.assert_allclose(found, vectors(model, [queries[name] for name in ids], 24), atol=1e-5)


def test_other_weights_are_encoded_anew(copied: Experiment, beir: Path) -> None:
    before = read(encode.run(copied) / "passages")[1]
    model = Path(copied.output_dir) / "model"
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= -1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    after = read(encode.run(copied, overwrite=True) / "passages")[1]
    texts = list(read_texts(beir / "corpus.jsonl").values())
    np.testing.assert_allclose(after, vectors(model, texts, 48), atol=1e-5)
    assert np.abs(after - before).max() > 0.1
