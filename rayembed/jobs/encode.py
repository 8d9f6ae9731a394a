"""The job `encode`: vectors of the corpus and of the evaluation queries in files, to fill an index of one's own.

Texts are encoded into the cache that all jobs share; from there, workers write the files, cut to encode.dimensions and
in the numbers of encode.output_dtype.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.wording import counted
from rayembed.data.copies import shown
from rayembed.data.embeddings import unit_length
from rayembed.data.mirror import folder_here, here, remove
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.storage import save_npy, whole_file, write_atomic
from rayembed.data.store import Store
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.session import ray_session
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors, part_name, rows_of_parts
from rayembed.jobs.vectors import Wanted, encode_stores, encoding_reads
from rayembed.models.loading import load_config, weights_fingerprint
from rayembed.tracking.progress import duration

FOLDERS = {"passage": "passages", "query": "queries"}
RANGES = "int8_ranges.json"
SAMPLE = 10_000  # passages that the ranges of int8 are taken from
OUTPUT = ("output_format", "output_dtype", "dimensions")

QUANTIZED: dict[str, Literal["int8", "ubinary"]] = {"int8": "int8", "binary": "ubinary"}  # sentence-transformers' names

Floats = NDArray[np.float32]
Numbers = NDArray[Any]

logger = logging.getLogger(__name__)


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Encodes with encode.model, else with the tuned model where there is one, else with the base model.

    Args:
        experiment: section encode; data.corpus, and data.evaluation for queries.
        overwrite: replace a folder that was encoded from something else.

    Returns:
        OUTPUT_DIR/encode: passages/ and queries/ with part-*.parquet (id, vector) or part-*.npy and part-*.ids.json,
        encode.json (model, dimension, sizes), and for int8 the ranges of the dimensions.

    Raises:
        ValueError: the data have errors, the model has fewer dimensions, or the folder was encoded from something else.
    """
    prepared = _data(experiment)
    dimension = _dimension(experiment)

    def write(folder: Path) -> None:
        with ray_session(experiment):
            _write(experiment, _stores(prepared), dimension, folder)

    final = Path(experiment.output_dir) / "encode"
    layout = [rows for store in _stores(prepared).values() for rows in store.layout]
    reads = _reads(experiment, prepared)
    return written_once(final, reads, write, overwrite=overwrite, experiment=experiment, layout=layout)


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    prepared = _data(experiment)
    counts = " and ".join(f"{counted(store.num_rows, f'{side} text')}" for side, store in _stores(prepared).items())
    where = state(Path(experiment.output_dir) / "encode", _reads(experiment, prepared), overwrite=overwrite)
    config = experiment.encode
    form = f"{_dimension(experiment)} dimensions of {config.output_dtype} in {config.output_format}"
    return f"encode: {counts} with {_model(experiment)}, {form}; {where}"


def _data(experiment: Experiment) -> Prepared:
    if experiment.trains_reranker() and experiment.encode.model is None:
        raise ValueError("a reranker gives no vectors; set encode.model to an embedder")
    corpus = bool(experiment.data.corpus) or experiment.data.evaluation is None
    prepared = prepare(experiment, rows=False, corpus=corpus)
    prepared.report.raise_if_errors()
    if not _stores(prepared):
        raise ValueError("there is nothing to encode; set data.corpus or data.evaluation")
    return prepared


def _stores(prepared: Prepared) -> dict[str, Store]:
    evaluation = prepared.evaluation
    corpus = prepared.corpus or (evaluation.corpus if evaluation else None)
    queries = evaluation.queries if evaluation else None
    return {side: store for side, store in (("passage", corpus), ("query", queries)) if store is not None}


def _model(experiment: Experiment) -> str:
    tuned = Path(experiment.output_dir) / "model"
    return experiment.encode.model or (str(folder_here(tuned)) if tuned.is_dir() else experiment.model.name_or_path)


def _dimension(experiment: Experiment) -> int:
    """Dimensions that are written."""
    name, wanted = _model(experiment), experiment.encode.dimensions
    settings = load_config(name, trust_remote_code=experiment.model.trust_remote_code)
    has = int(settings.hidden_size)
    if wanted is not None and wanted > has:
        raise ValueError(
            f"encode.dimensions is {wanted}, but vectors of {name} have {has}; allowed: 1 to {has}, or null for all"
        )
    return wanted or has


def _reads(experiment: Experiment, prepared: Prepared) -> Reads:
    texts = {side: store.fingerprint for side, store in _stores(prepared).items()}
    output = {key: value for key, value in asdict(experiment.encode).items() if key in OUTPUT}
    if output["output_dtype"] == "int8":
        output["seed"] = experiment.seed  # draws the sample that the ranges are taken from
    return {"texts": texts, "output": output, **encoding_reads(experiment, _model(experiment))}


def _write(experiment: Experiment, stores: Mapping[str, Store], dimension: int, folder: Path) -> None:
    start = time.monotonic()
    config, model = experiment.encode, _model(experiment)
    wanted = [Wanted(store, side) for side, store in stores.items()]
    vectors = dict(zip(stores, encode_stores(experiment, wanted, model=model), strict=True))
    scale = experiment.model.normalize_embeddings
    form = {"dimension": dimension, "scale": scale, "dtype": config.output_dtype}
    if config.output_dtype == "int8" and not (folder / RANGES).exists():
        ranges = int8_ranges(vectors["passage"], experiment.seed, dimension, scale=scale)
        write_atomic(folder / RANGES, json.dumps(ranges).encode())
    sides = {FOLDERS[side]: _write_side(experiment, own, form, folder / FOLDERS[side]) for side, own in vectors.items()}
    summary = {
        "model": shown(model),
        "weights": weights_fingerprint(model),
        "dimension": dimension,
        "normalized": scale,
        "dtype": config.output_dtype,
        "format": config.output_format,
        **sides,
    }
    write_atomic(folder / "encode.json", json.dumps(summary, indent=1).encode())
    for name in sides:  # others read these folders: they hold vectors and nothing else
        remove(folder / name / "done")
        for left in (folder / name).glob(".*"):  # what a killed worker was writing
            left.unlink()
    seconds = time.monotonic() - start
    rows, size = (sum(side[key] for side in sides.values()) for key in ("rows", "bytes"))
    logger.info(
        "encode: %s of %d dimensions, %s in %s, %.1f MB, took %s (%.1f a second, those of the cache included)",
        *(counted(rows, "vector"), dimension, config.output_dtype, config.output_format),
        *(size / 1e6, duration(seconds), rows / max(seconds, 1e-9)),
    )


def _write_side(experiment: Experiment, vectors: Vectors, form: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Rows, files of vectors, and bytes of all files."""
    store = vectors.store
    work = Work(
        what=f"write {folder.name}",
        counted=folder.name,
        worker="rayembed.jobs.encode:WriteWorker",
        arguments={
            "store": str(store.folder),
            "vectors": str(vectors.folder),
            "form": dict(form),
            "output_format": experiment.encode.output_format,
        },
        folder=folder,
    )
    units = [
        Unit(part_name(i), part.num_rows, {"part": i}, rows_of_parts(store, i, i + 1))
        for i, part in enumerate(store.parts)
    ]
    counts = run_units(units, work, experiment.ray, use_gpu=False)
    return {
        "rows": store.num_rows,
        "files": len(units),
        "bytes": sum(count["bytes"] for count in counts),
    }


def int8_ranges(vectors: Vectors, seed: int, dimension: int, *, scale: bool) -> dict[str, Any]:
    """Least and greatest value of each dimension in a sample of at most 10,000 vectors, drawn with the seed."""
    total = vectors.store.num_rows
    rows = np.sort(np.random.default_rng(seed).choice(total, min(SAMPLE, total), replace=False))
    sample = cut(vectors.take(rows), dimension, scale=scale)
    return {"minimum": sample.min(axis=0).tolist(), "maximum": sample.max(axis=0).tolist(), "vectors": len(rows)}


def cut(vectors: Floats, dimension: int, *, scale: bool) -> Floats:
    """The first dimensions of vectors [N, D], with length 1 if `scale`."""
    first = vectors[:, :dimension]
    return unit_length(first) if scale else first


def quantize(vectors: Floats, dtype: str, ranges: Floats | None) -> Numbers:
    """Vectors [N, D] in another type of numbers.

    Args:
        vectors: as float32.
        dtype: of encode.output_dtype.
        ranges: [2, D], least and greatest value of each dimension; what lies outside is put at the end. For int8.

    Returns:
        [N, D], where an int8 q stands for the step from minimum + (q + 128) x (maximum - minimum) / 255 on; for binary
        [N, D / 8 rounded up] uint8, a bit a dimension, 1 where it is above 0, the first dimension in the highest bit.
    """
    if dtype in ("float32", "float16"):
        return vectors.astype(dtype)
    from sentence_transformers.util.quantization import quantize_embeddings  # takes seconds to import

    return np.asarray(quantize_embeddings(vectors, QUANTIZED[dtype], ranges))


class WriteWorker:
    """Writes vectors of the cache, a file a part."""

    def __init__(
        self, *, store: str, vectors: str, form: dict[str, Any], output_format: str, threads: int, use_gpu: bool
    ) -> None:
        self._vectors = Vectors(Path(vectors), Store.open(Path(store)))
        self._form, self._save = form, FORMATS[output_format]

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        form, ranges = self._form, None
        if form["dtype"] == "int8":
            values = json.loads(here(folder.parent / RANGES).read_bytes())
            ranges = np.array([values["minimum"], values["maximum"]], np.float32)
        own = cut(np.asarray(self._vectors.part(spec["part"])), form["dimension"], scale=form["scale"])
        ids = self._vectors.store.read_part(spec["part"], ["id"]).column("id")
        return {"bytes": self._save(folder, name, ids, quantize(own, form["dtype"], ranges))}


def _save_parquet(folder: Path, name: str, ids: pa.ChunkedArray, numbers: Numbers) -> int:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])
    path = folder / f"{name}.parquet"
    with whole_file(path) as working:
        pq.write_table(pa.table({"id": ids, "vector": lists}), working)
    return path.stat().st_size


def _save_npy(folder: Path, name: str, ids: pa.ChunkedArray, numbers: Numbers) -> int:
    names, path = folder / f"{name}.ids.json", folder / f"{name}.npy"
    write_atomic(names, json.dumps(ids.to_pylist(), ensure_ascii=False).encode())
    save_npy(path, numbers)
    return names.stat().st_size + path.stat().st_size


FORMATS: dict[str, Callable[[Path, str, pa.ChunkedArray, Numbers], int]] = {"parquet": _save_parquet, "npy": _save_npy}
