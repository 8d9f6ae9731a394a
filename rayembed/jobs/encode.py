"""The job `encode`: vectors of the corpus and of the evaluation queries as parquet, for an index of one's own."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayembed.config import Experiment
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.store import Store
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.session import ray_session
from rayembed.jobs.vectors import Vectors, encode_store, encoding_reads

logger = logging.getLogger(__name__)


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Encodes with the tuned model where there is one, else with the base model.

    Args:
        experiment: data.corpus, and data.evaluation for queries.
        overwrite: replace a folder that was encoded from something else.

    Returns:
        OUTPUT_DIR/encode: passages/ and queries/ with part-*.parquet (id, vector as a list of float32).
    """
    prepared = _data(experiment)

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            for side, store in _stores(prepared).items():
                vectors = encode_store(experiment, store, side, model=_model(experiment))
                _write_parquet(store, vectors, folder / {"passage": "passages", "query": "queries"}[side])

    final = Path(experiment.output_dir) / "encode"
    return written_once(final, _reads(experiment, prepared), write, overwrite=overwrite, experiment=experiment)


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    prepared = _data(experiment)
    counts = " and ".join(f"{store.num_rows:,} {side} texts" for side, store in _stores(prepared).items())
    where = state(Path(experiment.output_dir) / "encode", _reads(experiment, prepared))
    return f"encode: {counts} with {_model(experiment)}; {where}"


def _data(experiment: Experiment) -> Prepared:
    prepared = prepare(experiment)
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
    return str(tuned) if tuned.is_dir() else experiment.model.name_or_path


def _reads(experiment: Experiment, prepared: Prepared) -> Reads:
    texts = {side: store.fingerprint for side, store in _stores(prepared).items()}
    return {"texts": texts, **encoding_reads(experiment, _model(experiment))}


def _write_parquet(store: Store, vectors: Vectors, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(len(store.parts)):
        part = vectors.part(index)
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
        table = pa.table({"id": store.read_part(index, ["id"]).column("id"), "vector": column})
        pq.write_table(table, folder / f"part-{index:05d}.parquet")
