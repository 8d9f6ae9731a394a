"""Vectors of a store's texts, cached by everything that they depend on; mining, scoring and evaluation share them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rayembed.config import Experiment
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import fingerprint
from rayembed.data.store import Store
from rayembed.jobs.shipping import absolute, received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors, part_name, rows_of_parts, save_part
from rayembed.models.encoding import encode, resolve_dtype, resolve_tokens_per_batch
from rayembed.models.families import FAMILIES
from rayembed.models.loading import check_length, load_embedder, load_tokenizer, pooling_of, weights_fingerprint

PROMPTS = (  # settings of the model that its vectors depend on
    "normalize_embeddings",
    "query_instruction_for_retrieval",
    "query_instruction_format",
    "passage_instruction_for_retrieval",
    "passage_instruction_format",
)


def encoding_reads(experiment: Experiment, *names: str) -> dict[str, Any]:
    """What vectors depend on beside the texts, for the record of a job: weights, prompts, lengths, dtype."""
    settings = asdict(experiment.model)
    return {
        "weights": [weights_fingerprint(name) for name in names or (experiment.model.name_or_path,)],
        "pooling": pooling_of(experiment.model),
        "model": {key: settings[key] for key in PROMPTS},
        "max_len": [experiment.max_len("query"), experiment.max_len("passage")],
        "dtype": experiment.encode.dtype,
    }


def encode_store(
    experiment: Experiment, store: Store, side: str, *, model: str | None = None, max_len: int | None = None
) -> Vectors:
    """Encodes what is not in the cache.

    Args:
        experiment: model, prompts, lengths, resources.
        store: of passages, queries, or training rows (their queries are encoded).
        side: query or passage.
        model: weights in place of the experiment's.
        max_len: tokens kept. None: by the experiment.
    """
    name = absolute(model or experiment.model.name_or_path)
    length = max_len or experiment.max_len(side)
    check_length(name, length, f"{side}_max_len", trust_remote_code=experiment.model.trust_remote_code)
    settings = asdict(experiment.model)
    depends_on = {
        "texts": [_texts_fingerprint(store), store.layout],
        "weights": weights_fingerprint(name),
        "model": {key: settings[key] for key in ("pooling", *PROMPTS)},
        "side": side,
        "max_len": length,
        "dtype": [experiment.encode.dtype, experiment.ray.use_gpu],
    }
    folder = Path(experiment.cache()) / f"vectors-{fingerprint(depends_on)}"
    units = [
        Unit(part_name(index), part.num_rows, {"part": index}, rows_of_parts(store, index, index + 1))
        for index, part in enumerate(store.parts)
    ]
    arguments = {
        "experiment": shipped(experiment),
        "store": str(store.folder),
        "side": side,
        "model": name,
        "max_len": length,
    }
    plural = {"query": "queries", "passage": "passages"}[side]
    work = Work(
        what=f"encode {plural}",
        counted=plural,
        worker="rayembed.jobs.vectors:EncodeWorker",
        arguments=arguments,
        folder=folder,
    )
    run_units(units, work, experiment.ray)
    (folder / "depends_on.json").write_text(json.dumps(depends_on, indent=1) + "\n")
    return Vectors(folder, store)


def _texts_fingerprint(store: Store) -> str:
    """Of training rows only their queries: negatives and scores come and go, and the vectors stay."""
    if store.schema.names[0] == "id":
        return store.fingerprint
    digest = hashlib.sha256()
    for part in store.iter_parts(["query", "prompt"]):
        digest.update(json.dumps(part.to_pylist()).encode())
    return digest.hexdigest()[:16]


class EncodeWorker:
    """Holds one embedder and encodes parts of a store."""

    def __init__(
        self, *, experiment: str, store: str, side: str, model: str, max_len: int, threads: int, use_gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self._experiment = received(experiment)
        self._store = Store.open(Path(store))
        self._side, self._max_len = side, max_len
        self._device = torch.device("cuda" if use_gpu else "cpu")
        config = self._experiment.model
        name = None if model == config.name_or_path else model
        self._model = load_embedder(config, name_or_path=name).to(self._device)
        self._tokenizer = load_tokenizer(
            model, padding_side=FAMILIES[config.family].padding_side, trust_remote_code=config.trust_remote_code
        )
        self._dtype = resolve_dtype(self._experiment.encode.dtype, self._device)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the vectors of one part."""
        table = self._store.read_part(spec["part"])
        column = (
            "query" if "query" in table.column_names else "text"
        )  # training rows, or a store of queries or passages
        model, texts = self._experiment.model, table.column(column).to_pylist()
        if self._side == "query":
            prompts = table.column("prompt").to_pylist()
            texts = [query_text(model, text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        else:
            texts = [passage_text(model, text) for text in texts]
        vectors = encode(
            self._model,
            self._tokenizer,
            texts,
            max_len=self._max_len,
            tokens_per_batch=resolve_tokens_per_batch(self._experiment.encode.tokens_per_batch, self._device),
            dtype=self._dtype,
        )
        save_part(folder, spec["part"], vectors)
        return {"rows": len(vectors), "dimension": int(vectors.shape[1]), "dtype": str(self._dtype)}
