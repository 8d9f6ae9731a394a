"""Vectors of a store's texts, cached by everything that they depend on; mining, scoring and evaluation share them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import fingerprint, write_atomic
from rayembed.data.store import Int64s, Store
from rayembed.jobs.shipping import absolute, received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors, part_name, rows_of_parts, save_part
from rayembed.models.encoding import encode_ids, resolve_dtype, resolve_tokens_per_batch, tokenize
from rayembed.models.in_context import QueryReader, icl_section, reader_of
from rayembed.models.loading import check_length, load_embedder, pooling_of, tokenizer_of, weights_fingerprint

PROMPTS = (  # settings of the model that its vectors depend on
    "normalize_embeddings",
    "query_instruction_for_retrieval",
    "query_instruction_format",
    "passage_instruction_for_retrieval",
    "passage_instruction_format",
)
BLOCK_ROWS, PASSAGES_ON_GPU = 512, 2048  # block_rows says of what


def block_rows(side: str, *, use_gpu: bool) -> int:
    """Rows of a store that are sorted and batched together, whatever the units: a block begins at a multiple of it.

    The last bits of a vector depend on the texts that it shares a batch with, and so must those not depend on the
    units. Larger blocks have less padding: of medquad's passages, 6% with 256 in batches of 4096 tokens and 3% with
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
        "family": [experiment.model.family, experiment.model.bidirectional],
        **_icl_reads(experiment),
    }


@dataclass(frozen=True)
class Wanted:
    """Texts to be encoded."""

    store: Store
    """Of passages, queries, or training rows (their queries are encoded)."""

    side: str
    """query or passage."""

    max_len: int | None = None
    """Tokens kept. None: by the experiment."""


def encode_stores(experiment: Experiment, wanted: Sequence[Wanted], *, model: str | None = None) -> list[Vectors]:
    """Encodes what is not in the cache, all in one pass: a worker that has loaded the model reads both sides.

    Args:
        experiment: model, prompts, lengths, resources.
        wanted: stores and their sides.
        model: weights in place of the experiment's.
    """
    name = absolute(model or experiment.model.name_or_path)
    found, units, stores = list[Vectors](), list[Unit](), list[tuple[str, str, int]]()
    for own in wanted:
        length = own.max_len or experiment.max_len(own.side)
        check_lengths(experiment, own.side, length, name)
        depends_on = _depends_on(experiment, own, name, length)
        folder = Path(experiment.cache()) / f"vectors-{fingerprint(depends_on)}"
        write_atomic(folder / "depends_on.json", json.dumps(depends_on, indent=1).encode())
        units += [
            Unit(
                part_name(index),
                part.num_rows,
                {"of": len(stores), "part": index},
                rows_of_parts(own.store, index, index + 1),
                folder,
            )
            for index, part in enumerate(own.store.parts)
        ]
        stores.append((str(own.store.folder), own.side, length))
        found.append(Vectors(folder, own.store))
    plurals = dict.fromkeys({"query": "queries", "passage": "passages"}[own.side] for own in wanted)
    work = Work(
        what=f"encode {' and '.join(plurals)}",
        counted=next(iter(plurals)) if len(plurals) == 1 else "texts",
        worker="rayembed.jobs.vectors:EncodeWorker",
        arguments={"experiment": shipped(experiment), "stores": stores, "model": name},
        folder=found[0].folder,
    )
    run_units(units, work, experiment.ray)
    return found


def task_examples(experiment: Experiment, reader: QueryReader) -> str:
    """icl.examples_for_task as they are read before every query; empty where there are none."""
    model, examples = experiment.model, reader.icl.examples_for_task
    return "".join(reader.written([(query_text(model, one.query, one.instruct), one.response) for one in examples]))


def _icl_reads(experiment: Experiment) -> dict[str, Any]:
    icl = icl_section(experiment)
    if icl is None:
        return {}
    return {"icl": [icl.icl_suffix_str, [asdict(example) for example in icl.examples_for_task]]}


def check_lengths(experiment: Experiment, side: str, length: int, name: str) -> None:
    """Refuses texts that are longer than a model reads.

    Args:
        experiment: examples of family icl, which come before queries.
        side: query or passage.
        length: tokens kept of a text.
        name: of the model.

    Raises:
        ValueError: names the setting.
    """
    remote, setting = experiment.model.trust_remote_code, f"{side}_max_len"
    icl = icl_section(experiment)
    if side == "query" and icl is not None and icl.examples_for_task:
        reader = QueryReader(tokenizer_of(experiment.model), icl)
        examples = reader.num_tokens(task_examples(experiment, reader))
        if examples > icl.examples_max_len:
            raise ValueError(
                f"icl.examples_for_task have {examples} tokens, and icl.examples_max_len is {icl.examples_max_len}; "
                "raise it, or take fewer or shorter examples"
            )
        length += examples
        setting += " with icl.examples_for_task"
    check_length(name, length, setting, trust_remote_code=remote)


def _depends_on(experiment: Experiment, wanted: Wanted, model: str, max_len: int) -> dict[str, Any]:
    settings = asdict(experiment.model)
    return {
        "texts": [_texts_fingerprint(wanted.store), wanted.store.layout],
        "weights": weights_fingerprint(model),
        "model": {key: settings[key] for key in ("family", "pooling", "bidirectional", *PROMPTS)},
        "side": wanted.side,
        **(_icl_reads(experiment) if wanted.side == "query" else {}),
        "max_len": max_len,
        "dtype": experiment.encode.dtype,
        **batching_reads(experiment),
        "cpus_per_worker": experiment.ray.cpus_per_worker,
        "block_rows": block_rows(wanted.side, use_gpu=experiment.ray.use_gpu),
    }


def _texts_fingerprint(store: Store) -> str:
    """Of training rows only their queries: negatives and scores come and go, and the vectors stay."""
    if store.schema.names[0] == "id":
        return store.fingerprint
    digest = hashlib.sha256()
    for part in store.iter_parts(["query", "prompt"]):
        digest.update(json.dumps(part.to_pylist()).encode())
    return digest.hexdigest()[:16]


class TextReader:
    """Texts of stores to token ids, as mining and evaluation put them to the model."""

    def __init__(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = experiment.model, tokenizer
        self._reader = reader_of(experiment, tokenizer)
        self._examples = "" if self._reader is None else task_examples(experiment, self._reader)

    def __call__(self, store: Store, side: str, rows: Int64s, max_len: int) -> list[list[int]]:
        """Token ids of rows of a store, cut to a length; `side` is query or passage."""
        texts = self._texts(store, side, rows)
        if self._reader is None or side != "query":
            return tokenize(self._tokenizer, texts, max_len) if texts else []
        return self._reader.tokens(texts, max_len, [self._examples] * len(texts))

    def _texts(self, store: Store, side: str, rows: Int64s) -> list[str]:
        column = "query" if "query" in store.schema.names else "text"  # training rows have queries
        found = store.take(rows, [column, *(["prompt"] if side == "query" else [])])
        texts = found.column(column).to_pylist()
        if side == "query":
            prompts = found.column("prompt").to_pylist()
            return [query_text(self._model, text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        return [passage_text(self._model, text) for text in texts]


class EncodeWorker:
    """Holds one embedder and encodes parts of stores."""

    def __init__(
        self, *, experiment: str, stores: list[tuple[str, str, int]], model: str, threads: int, use_gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self._experiment = received(experiment)
        self._wanted = [Wanted(Store.open(Path(folder)), side, max_len) for folder, side, max_len in stores]
        self._name, self._use_gpu, self._device = model, use_gpu, _device(use_gpu)
        config = self._experiment.model
        name = None if model == config.name_or_path else model
        self._model = load_embedder(config, name_or_path=name).to(self._device)
        self._tokenizer = tokenizer_of(config, name_or_path=name)
        self._dtype = resolve_dtype(self._experiment.encode.dtype, self._device)
        self._read = TextReader(self._experiment, self._tokenizer)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes the vectors of one part.

        Raises:
            ValueError: a vector is not finite.
        """
        wanted = self._wanted[spec["of"]]
        part, size = wanted.store.parts[spec["part"]], block_rows(wanted.side, use_gpu=self._use_gpu)
        end = part.first_row + part.num_rows
        blocks = range(part.first_row // size * size, end, size)
        vectors = np.concatenate(
            [self._of_block(wanted, (block, block + size), part.first_row, end) for block in blocks]
        )
        save_part(folder, spec["part"], vectors)
        return {"rows": len(vectors), "dimension": int(vectors.shape[1]), "dtype": str(self._dtype)}

    def _of_block(self, wanted: Wanted, block: tuple[int, int], first: int, last: int) -> NDArray[np.float32]:
        """Vectors of those rows of the block that are `first` to `last` - 1."""
        assert wanted.max_len is not None
        rows = np.arange(block[0], min(block[1], wanted.store.num_rows))
        vectors = encode_ids(
            self._model,
            self._tokenizer,
            self._read(wanted.store, wanted.side, rows, wanted.max_len),
            tokens_per_batch=resolve_tokens_per_batch(self._experiment.encode.tokens_per_batch, self._device),
            dtype=self._dtype,
        )
        start = max(first, block[0])
        own = vectors[start - block[0] : last - block[0]]
        bad = np.flatnonzero(~np.isfinite(own).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{self._name} gives vectors that are not finite for {bad.size} of {len(own)} texts, the first of them "
                f"row {start + bad[0]} of {wanted.store.folder}; set encode.dtype: float32 (it was {self._dtype}), or "
                "another model"
            )
        return own
