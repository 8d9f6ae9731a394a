"""Vectors of a store's texts: the same however units are cut, never of something else, never nonsense; no Ray."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.jobs import EncodeConfig
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.data.store import PASSAGES, QUERIES, Store, StoreWriter
from rayembed.jobs import vectors
from rayembed.jobs.shipping import shipped
from rayembed.jobs.vector_files import Vectors
from rayembed.jobs.vectors import EncodeWorker, Wanted, encode_stores
from rayembed.models.encoding import encode_ids
from tests.jobs.conftest import MakeExperiment

MAX_LEN = 48
ROWS = 300


def texts_of(rows: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices("rain sun wind snow ice fog hail".split(), k=rng.randint(1, 9))) for _ in range(rows)]


def stored(folder: Path, rows_per_part: int, *, side: str = "passage") -> Store:
    writer = StoreWriter(folder, QUERIES if side == "query" else PASSAGES, rows_per_part)
    for number, text in enumerate(texts_of(ROWS)):
        writer.add({"id": f"p{number}", "text": text})
    return writer.finish()


def worker(experiment: Experiment, store: Store, side: str = "passage") -> EncodeWorker:
    model = experiment.model.name_or_path
    stores = [(str(store.folder), side, MAX_LEN)]
    return EncodeWorker(experiment=shipped(experiment), stores=stores, model=model, threads=1, use_gpu=False)


def encoded(experiment: Experiment, store: Store, folder: Path, side: str = "passage") -> NDArray[np.float32]:
    """All vectors, by a worker that does the last part first."""
    folder.mkdir()
    own = worker(experiment, store, side)
    for part in reversed(range(len(store.parts))):
        assert own({"of": 0, "part": part}, "", folder)["rows"] == store.parts[part].num_rows
    return Vectors(folder, store).all()


@pytest.fixture
def experiment(make_experiment: MakeExperiment, tmp_path: Path) -> Experiment:
    made = make_experiment(tmp_path / "run")
    return replace(made, encode=EncodeConfig(dtype="bfloat16", tokens_per_batch=512))


@pytest.mark.parametrize("side", ["passage", "query"])
def test_vectors_are_the_same_to_the_last_bit_however_units_are_cut(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 64)
    found = [
        encoded(experiment, stored(tmp_path / f"store-{rows}", rows, side=side), tmp_path / f"vectors-{rows}", side)
        for rows in (2048, 50, 97)
    ]
    assert found[0].shape == (ROWS, 64)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    exact = encoded(
        replace(experiment, encode=EncodeConfig(dtype="float32")),
        stored(tmp_path / "store", 2048, side=side),
        tmp_path / "vectors",
        side,
    )
    assert np.einsum("nd,nd->n", exact, found[0]).min() > 0.999, "every vector is in its own row"


@pytest.mark.parametrize(
    ("side", "use_gpu", "rows"),
    [("passage", False, 512), ("query", False, 512), ("query", True, 512), ("passage", True, 2048)],
)
def test_units_of_the_default_size_are_whole_blocks(side: str, use_gpu: bool, rows: int) -> None:
    """Else a row of two units is encoded twice."""
    model = ModelConfig(name_or_path="any")
    made = Experiment(output_dir="runs/any", model=model, ray=RayConfig(use_gpu=use_gpu))
    assert vectors.block_rows(side, use_gpu=use_gpu) == rows
    assert (made.encode.queries_per_unit if side == "query" else made.passages_per_unit()) % rows == 0


def test_a_change_of_what_the_last_bits_depend_on_is_another_cache(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "run_units", lambda _, work, __: work.folder.mkdir(parents=True, exist_ok=True))
    store = stored(tmp_path / "store", 50)

    def folder(**changes: Any) -> Path:  # noqa: ANN401 - settings
        config = replace(experiment, **changes)
        return encode_stores(config, [Wanted(store, "passage", MAX_LEN)])[0].folder

    on_gpu = RayConfig(use_gpu=True)
    found = [
        folder(),
        folder(encode=EncodeConfig(dtype="bfloat16", tokens_per_batch=513)),
        folder(encode=EncodeConfig(dtype="bfloat16", tokens_per_batch=4096)),
        folder(encode=EncodeConfig(dtype="bfloat16"), ray=on_gpu),
        folder(encode=EncodeConfig(dtype="bfloat16", tokens_per_batch=4096), ray=on_gpu),
        folder(ray=RayConfig(cpus_per_worker=2)),
    ]
    assert folder(encode=EncodeConfig(dtype="bfloat16")) == found[2], "what null stands for on a CPU"
    assert folder(ray=RayConfig(num_workers=2)) == found[0]
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 64)
    found.append(folder())
    assert len(set(found)) == len(found)


def test_vectors_that_are_not_finite_are_refused_by_the_first_row(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "BLOCK_ROWS", 64)

    def broken(*arguments: Any, **settings: Any) -> NDArray[np.float32]:  # noqa: ANN401 - those of encode_ids
        found = encode_ids(*arguments, **settings)
        found[6:10, 3] = np.nan  # rows 6 to 9 of each block: 70 to 73 are those of the second
        found[20, 0] = np.inf
        return found

    monkeypatch.setattr(vectors, "encode_ids", broken)
    store = stored(tmp_path / "store", 50)
    own = worker(experiment, store)
    with pytest.raises(
        ValueError, match=r"5 of 36 texts, the first of them row 70 .*set encode\.dtype: float32"
    ) as told:
        own({"of": 0, "part": 1}, "", tmp_path)
    assert experiment.model.name_or_path in str(told.value)
    assert str(torch.bfloat16) in str(told.value)
    assert not list(tmp_path.glob("*.npy"))
