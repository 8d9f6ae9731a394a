"""Vectors of a store's texts, cached by everything that they depend on; mining, scoring and evaluation share them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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


BLOCK_ROWS, PASSAGES_ON_GPU = 512, 2048


def block_rows(side: str, *, use_gpu: bool) -> int:
    """Rows of a store that are sorted and batched together, whatever the units: a block begins at a multiple of it.

    The last bits of a vector depend on the texts that it shares a batch with, and so must those not depend on the
    units. Larger blocks have less padding: of medquad's passages, 5% with 256 in batches of 4096 tokens and 3% with
    512; in a GPU's batches of 65536, 34% with 512 and 11% with 2048.
    """
    return PASSAGES_ON_GPU if use_gpu and side == "passage" else BLOCK_ROWS


def batching_reads(experiment: Experiment) -> dict[str, Any]:
    """What the last bits of vectors and of scores depend on beside model, texts and dtype."""
    use_gpu = experiment.ray.use_gpu
    tokens = resolve_tokens_per_batch(experiment.encode.tokens_per_batch, _device(use_gpu))
    return {"use_gpu": use_gpu, "tokens_per_batch": tokens}


def _device(use_gpu: bool) -> torch.device:
    return torch.device("cuda" if use_gpu else "cpu")


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
        "dtype": experiment.encode.dtype,
        **batching_reads(experiment),
        "cpus_per_worker": experiment.ray.cpus_per_worker,
        "block_rows": block_rows(side, use_gpu=experiment.ray.use_gpu),
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
        self._side, self._max_len, self._name = side, max_len, model
        self._column = "query" if "query" in self._store.schema.names else "text"  # training rows have queries
        self._block_rows = block_rows(side, use_gpu=use_gpu)
        self._device = _device(use_gpu)
        config = self._experiment.model
        name = None if model == config.name_or_path else model
        self._model = load_embedder(config, name_or_path=name).to(self._device)
        self._tokenizer = load_tokenizer(
            model, padding_side=FAMILIES[config.family].padding_side, trust_remote_code=config.trust_remote_code
        )
        self._dtype = resolve_dtype(self._experiment.encode.dtype, self._device)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the vectors of one part.

        Raises:
            ValueError: a vector is not finite.
        """
        part = self._store.parts[spec["part"]]
        end = part.first_row + part.num_rows
        blocks = range(part.first_row // self._block_rows * self._block_rows, end, self._block_rows)
        vectors = np.concatenate([self._of_block(block, part.first_row, end) for block in blocks])
        save_part(folder, spec["part"], vectors)
        return {"rows": len(vectors), "dimension": int(vectors.shape[1]), "dtype": str(self._dtype)}

    def _of_block(self, block: int, first: int, last: int) -> NDArray[np.float32]:
        """Vectors of those rows of the block (named by its first row) that are `first` to `last` - 1."""
        vectors = encode(
            self._model,
            self._tokenizer,
            self._texts(block, min(block + self._block_rows, self._store.num_rows)),
            max_len=self._max_len,
            tokens_per_batch=resolve_tokens_per_batch(self._experiment.encode.tokens_per_batch, self._device),
            dtype=self._dtype,
        )
        start = max(first, block)
        own = vectors[start - block : last - block]
        bad = np.flatnonzero(~np.isfinite(own).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{self._name} gives vectors that are not finite for {bad.size} of {len(own)} texts, the first of them "
                f"row {start + bad[0]} of {self._store.folder}; set encode.dtype: float32 (it was {self._dtype}), or "
                "another model"
            )
        return own

    def _texts(self, first: int, last: int) -> list[str]:
        """The texts of rows `first` to `last` - 1 as the model reads them."""
        model, of_query = self._experiment.model, self._side == "query"
        rows = self._store.take(np.arange(first, last), [self._column, *(["prompt"] if of_query else [])])
        texts = rows.column(self._column).to_pylist()
        if of_query:
            prompts = rows.column("prompt").to_pylist()
            return [query_text(model, text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        return [passage_text(model, text) for text in texts]
