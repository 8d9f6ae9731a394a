"""The job encode: files of vectors in the form asked for, from the cache where it has them, never of other weights."""

import json
import logging
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from rayembed.config import Experiment
from rayembed.data.embeddings import read_headers, unit_length
from rayembed.data.prepare import prepare
from rayembed.data.problems import DataError
from rayembed.data.storage import working_folder
from rayembed.data.store import Store
from rayembed.jobs import encode, units
from rayembed.jobs.embeddings import given_vectors
from rayembed.jobs.vector_files import Vectors
from rayembed.jobs.vectors import Wanted, encode_stores
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_data import NUM_PASSAGES, NUM_TEST, NUM_TRAIN, read_texts
from tests.jobs.units_here import UnitsHere

PARTS = 3  # of 120 passages, 50 a unit


def read(folder: Path, dtype: type[np.generic] = np.float32) -> tuple[list[str], NDArray[Any]]:
    table = pq.read_table(folder)
    return table.column("id").to_pylist(), np.array(table.column("vector").to_pylist(), dtype)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> UnitsHere:
    """Units are done in this process."""
    found = UnitsHere()
    monkeypatch.setattr(units, "_stream", found.stream)
    monkeypatch.setattr(encode, "ray_session", lambda _: nullcontext())
    return found


@pytest.fixture
def tuned(make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path) -> Experiment:
    """With a model/ in its run folder that is not the base model."""
    shutil.copytree(tiny_model, tmp_path / "run" / "model")
    turn(tmp_path / "run" / "model")
    return make_experiment(tmp_path / "run")


def turn(model: Path) -> None:
    """Gives a model other weights."""
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= -1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def asking(experiment: Experiment, **settings: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
    return replace(experiment, encode=replace(experiment.encode, **settings))


def encoded(experiment: Experiment) -> tuple[Vectors, Vectors]:
    """Of passages and queries, as the job finds them in the cache."""
    prepared = prepare(experiment)
    assert prepared.corpus is not None
    assert prepared.evaluation is not None
    stores: list[tuple[Store, str]] = [(prepared.corpus, "passage"), (prepared.evaluation.queries, "query")]
    model = str(Path(experiment.output_dir) / "model")
    wanted = [Wanted(store, side) for store, side in stores]
    passages, queries = encode_stores(experiment, wanted, model=model)
    return passages, queries


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_texts_become_files_on_ray(tuned: Experiment, beir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        folder = encode.run(tuned)
    model = Path(tuned.output_dir) / "model"
    passages, queries = read_texts(beir / "corpus.jsonl"), read_texts(beir / "queries.jsonl")
    ids, found = read(folder / "passages")
    assert ids == list(passages)
    names = sorted(path.name for path in (folder / "passages").iterdir())
    assert names == [f"part-{i:05d}.parquet" for i in range(PARTS)]
    np.testing.assert_allclose(found, vectors(model, list(passages.values()), 48), atol=1e-5)
    ids, found = read(folder / "queries")
    assert ids == list(queries)[NUM_TRAIN:], "those that are judged"
    np.testing.assert_allclose(found, vectors(model, [queries[name] for name in ids], 24), atol=1e-5)

    summary = json.loads((folder / "encode.json").read_text())
    assert (summary["model"], summary["dimension"], summary["dtype"]) == (str(model), 64, "float32")
    sizes = sum(path.stat().st_size for path in (folder / "passages").iterdir())
    assert summary["passages"] == {"rows": NUM_PASSAGES, "files": PARTS, "bytes": sizes}
    assert summary["queries"]["rows"] == NUM_TEST
    (line,) = [record.message for record in caplog.records if record.message.startswith("encode: 1")]
    assert line.startswith("encode: 140 vectors of 64 dimensions, float32 in parquet, ")
    assert "a second" in line


def test_other_weights_are_encoded_anew(here: UnitsHere, tuned: Experiment, beir: Path) -> None:
    before = read(encode.run(tuned) / "passages")[1]
    model = Path(tuned.output_dir) / "model"
    turn(model)
    after = read(encode.run(tuned, overwrite=True) / "passages")[1]
    texts = list(read_texts(beir / "corpus.jsonl").values())
    np.testing.assert_allclose(after, vectors(model, texts, 48), atol=1e-5)
    assert np.abs(after - before).max() > 0.1


def test_another_model_is_encoded_with_where_it_is_named(
    here: UnitsHere, tuned: Experiment, tiny_model: Path, beir: Path
) -> None:
    folder = encode.run(asking(tuned, model=str(tiny_model)))
    texts = list(read_texts(beir / "corpus.jsonl").values())
    np.testing.assert_allclose(read(folder / "passages")[1], vectors(tiny_model, texts, 48), atol=1e-5)
    assert json.loads((folder / "encode.json").read_text())["model"] == str(tiny_model)


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read_back_as_given_embeddings(
    here: UnitsHere, tuned: Experiment, form: str, dtype: str
) -> None:
    passages, queries = encoded(tuned)
    folder = encode.run(asking(tuned, output_format=form, output_dtype=dtype))
    (first, *_) = read_headers([str(folder / "passages")], setting="")
    assert first.kind == {"parquet": "parquet", "npy": "npy with ids beside"}[form]
    if form == "npy":
        assert np.load(folder / "passages" / "part-00001.npy").dtype == dtype
        assert not list((folder / "passages").glob("*partial*"))
    else:
        assert pq.read_schema(folder / "passages" / "part-00001.parquet").field(
            "vector"
        ).type.value_type == dtype.replace("float16", "halffloat")
    for own, name in ((passages, "passages"), (queries, "queries")):
        given = given_vectors(tuned, own.store, [str(folder / name)], setting="mine.corpus_embeddings")
        expected = own.all() if dtype == "float32" else unit_length(own.all().astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(given.all(), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_first_dimensions_are_scaled_where_vectors_are(here: UnitsHere, tuned: Experiment, normalize: bool) -> None:
    experiment = replace(tuned, model=replace(tuned.model, normalize_embeddings=normalize))
    full = encoded(experiment)[0].all()[:, :10].astype(np.float64)
    folder = encode.run(asking(experiment, dimensions=10))
    expected = full / np.linalg.norm(full, axis=1, keepdims=True) if normalize else full
    np.testing.assert_allclose(read(folder / "passages")[1], expected, atol=1e-6)
    assert json.loads((folder / "encode.json").read_text())["dimension"] == 10


def test_more_dimensions_than_the_model_has_are_refused_before_ray(
    here: UnitsHere, tuned: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "ray_session", lambda _: pytest.fail("Ray was started"))
    for job in (encode.run, encode.plan):
        with pytest.raises(ValueError, match=r"encode\.dimensions is 65, but vectors of .* have 64; allowed: 1 to 64"):
            job(asking(tuned, dimensions=65))


def test_binary_vectors_order_passages_as_their_signs_do(here: UnitsHere, tuned: Experiment) -> None:
    passages, queries = encoded(tuned)
    folder = encode.run(asking(tuned, output_dtype="binary", output_format="npy", dimensions=60))
    bits = [np.concatenate([np.load(p) for p in sorted((folder / n).glob("*.npy"))]) for n in ("passages", "queries")]
    assert [(own.dtype, own.shape[1]) for own in bits] == [(np.dtype(np.uint8), 8)] * 2
    found = np.unpackbits(bits[1][:, None] ^ bits[0][None], axis=2).sum(axis=2)
    signs = [own.all()[:, :60] > 0 for own in (passages, queries)]
    np.testing.assert_array_equal(found, (signs[1][:, None] != signs[0][None]).sum(axis=2))


def test_int8_vectors_are_within_a_step_and_rank_alike(here: UnitsHere, tuned: Experiment) -> None:
    passages, queries = (own.all() for own in encoded(tuned))
    folder = encode.run(asking(tuned, output_dtype="int8"))
    ranges = json.loads((folder / "int8_ranges.json").read_text())
    assert ranges["vectors"] == NUM_PASSAGES
    least, greatest = np.float64(ranges["minimum"]), np.float64(ranges["maximum"])
    np.testing.assert_allclose([least, greatest], [passages.min(axis=0), passages.max(axis=0)])
    step = (greatest - least) / 255
    found = [read(folder / name, np.int8)[1] for name in ("passages", "queries")]
    assert (found[0].min(), found[0].max()) == (-128, 127)
    for own, numbers in ((passages, found[0]), (queries, found[1])):
        back = least + (numbers.astype(np.float64) + 128) * step
        error = np.clip(own, least, greatest) - back
        assert (error >= -1e-6).all()
        assert (error <= step + 1e-6).all(), "queries by the ranges of the passages"
    middle = [least + (own.astype(np.float64) + 128.5) * step for own in found]
    exact, close = queries @ passages.T, middle[1] @ middle[0].T
    assert (exact.argmax(axis=1) == close.argmax(axis=1)).mean() >= 0.95


def test_ranges_come_from_a_sample_that_the_seed_draws(
    here: UnitsHere, tuned: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages, _ = encoded(tuned)
    monkeypatch.setattr(encode, "SAMPLE", 20)
    first, again, other = (encode.int8_ranges(passages, seed, 8, scale=False) for seed in (1, 1, 2))
    assert first == again != other
    assert first["vectors"] == 20
    assert len(first["minimum"]) == 8


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_quantized_vectors_are_no_given_embeddings(here: UnitsHere, tuned: Experiment, form: str, dtype: str) -> None:
    folder = encode.run(asking(tuned, output_format=form, output_dtype=dtype))
    with pytest.raises(DataError, match=r"type u?int8, allowed: .*quantised vectors give other scores"):
        read_headers([str(folder / "passages")], setting="mine.corpus_embeddings")


def test_vectors_come_from_the_cache(here: UnitsHere, tuned: Experiment) -> None:
    encoded(tuned)
    here.workers.clear()
    encode.run(tuned)
    assert here.workers == {"WriteWorker"}


def test_a_killed_run_goes_on_with_what_is_left(here: UnitsHere, tuned: Experiment) -> None:
    experiment = asking(tuned, output_dtype="int8", output_format="npy")
    whole = encode.run(experiment)
    expected = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.name.startswith("part")}
    shutil.rmtree(whole)
    here.stop_at = "part-00000"
    with pytest.raises(KeyboardInterrupt):
        encode.run(experiment)
    assert not whole.exists()
    (working_folder(whole) / "passages" / ".part-00000.npy.host.77.partial").touch()  # what it was killed over
    here.stop_at = None
    here.done.clear()
    encode.run(experiment)
    assert here.done == ["passages/part-00000", "queries/part-00000"]
    assert {path.relative_to(whole): path.read_bytes() for path in whole.rglob("part-*")} == expected
    files = [f"part-{i:05d}.{ending}" for i in range(PARTS) for ending in ("ids.json", "npy")]
    assert sorted(path.name for path in (whole / "passages").iterdir()) == files
