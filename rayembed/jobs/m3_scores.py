"""Scores of BGE-M3's heads for each query's best passages by the dense vectors, a unit a part of the corpus.

A worker encodes the candidates of its part once, and holds the token vectors of all queries.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayembed.config import Experiment
from rayembed.data.mirror import here
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import fingerprint, save_npy
from rayembed.data.store import Store
from rayembed.jobs.rerank import Candidates, candidates_file
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vectors import encoding_reads
from rayembed.models.chunks import pad_chunks
from rayembed.models.encoding import autocast, resolve_dtype, resolve_tokens_per_batch, tokenize
from rayembed.models.m3 import M3Embedder, concatenate
from rayembed.models.similarity import SIMILARITIES, Texts
from rayembed.models.trained import build_model, build_tokenizer

HEADS = tuple(SIMILARITIES)
PASSAGES_AT_ONCE = 64  # whose token vectors are in memory together


def head_scores(
    experiment: Experiment, model: str, queries: Store, corpus: Store, candidates: Candidates
) -> list[dict[str, NDArray[np.float32]]]:
    """Scores of each query's candidates by each head, in their order.

    Args:
        experiment: its family is m3.
        model: name or folder of the weights.
        queries: Q queries.
        corpus: the passages.
        candidates: of each query, rows of the corpus.
    """
    asked = replace(
        experiment,
        model=replace(experiment.model, name_or_path=model),
        output_dir=os.path.join(experiment.output_dir, "evaluate"),  # what is asked is not what is trained
        cache_dir=experiment.cache(),
        train=None,
        mine=None,
    )
    file = candidates_file(experiment, queries, corpus, candidates)
    depends_on = [encoding_reads(asked), file.name, corpus.layout]
    folder = Path(experiment.cache()) / f"m3-scores-{fingerprint(depends_on)}"
    work = Work(
        what="score by all heads",
        counted="passages",
        worker="rayembed.jobs.m3_scores:HeadsWorker",
        arguments={
            "experiment": shipped(asked),
            "queries": str(queries.folder),
            "corpus": str(corpus.folder),
            "candidates": str(file),
        },
        folder=folder,
    )
    units = [Unit(f"part-{i:05d}", part.num_rows, {"part": i}) for i, part in enumerate(corpus.parts)]
    run_units(units, work, experiment.ray, use_gpu=None)
    rows = np.concatenate(candidates)
    found = np.empty((len(rows), len(HEADS)), np.float32)
    for i, part in enumerate(corpus.parts):
        inside = (rows >= part.first_row) & (rows < part.first_row + part.num_rows)
        found[inside] = np.load(here(folder / f"part-{i:05d}.npy"))
    ends = np.cumsum([len(own) for own in candidates])[:-1]
    return [dict(zip(HEADS, own.T, strict=True)) for own in np.split(found, ends)]


class HeadsWorker:
    """Holds the model and the representations of all queries."""

    def __init__(
        self, *, experiment: str, queries: str, corpus: str, candidates: str, threads: int, use_gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self._experiment = received(experiment)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        model = build_model(self._experiment).to(self._device)
        assert isinstance(model, M3Embedder)
        self._model, self._tokenizer = model, build_tokenizer(self._experiment)
        self._corpus = Store.open(Path(corpus))
        with np.load(here(Path(candidates))) as file:
            self._rows, ends = file["rows"], file["ends"]
        self._query_of = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        settings = self._experiment.model
        asked = [row for table in Store.open(Path(queries)).iter_parts() for row in table.to_pylist()]
        texts = [query_text(settings, row["text"], row["prompt"]) for row in asked]
        pieces = [
            self._represent(texts[i : i + PASSAGES_AT_ONCE], "query") for i in range(0, len(texts), PASSAGES_AT_ONCE)
        ]
        self._queries = concatenate(pieces)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes scores [pairs of the part, heads], in the order of the candidates."""
        part = self._corpus.parts[spec["part"]]
        inside = np.flatnonzero((self._rows >= part.first_row) & (self._rows < part.first_row + part.num_rows))
        scores = np.empty((len(inside), len(HEADS)), np.float32)
        passages = np.unique(self._rows[inside])
        for start in range(0, len(passages), PASSAGES_AT_ONCE):
            some = passages[start : start + PASSAGES_AT_ONCE]
            texts = self._corpus.take(some, ["text"]).column("text").to_pylist()
            found = self._represent([passage_text(self._experiment.model, text) for text in texts], "passage")
            pairs = np.flatnonzero(np.isin(self._rows[inside], some))
            own = np.searchsorted(some, self._rows[inside[pairs]])
            scores[pairs] = self._paired(self._query_of[inside[pairs]], own, found)
        save_npy(folder / f"{name}.npy", scores)
        return {"passages": len(passages)}

    @torch.inference_mode()
    def _represent(self, texts: list[str], side: str) -> Texts:
        batch = pad_chunks(
            tokenize(self._tokenizer, texts, self._experiment.max_len(side)),
            pad_token=int(self._tokenizer.pad_token_id),
            padding_side=self._tokenizer.padding_side,
            tokens_per_chunk=resolve_tokens_per_batch(self._experiment.encode.tokens_per_batch, self._device),
        ).to(self._device)
        with autocast(resolve_dtype(self._experiment.encode.dtype, self._device), self._device):
            return self._model.represent(batch)

    @torch.inference_mode()
    def _paired(self, queries: NDArray[np.int64], passages: NDArray[np.int64], found: Texts) -> NDArray[np.float32]:
        def rows(texts: Texts, which: NDArray[np.int64]) -> dict[str, Tensor]:
            return {name: values[torch.from_numpy(which).to(values.device)] for name, values in texts.items()}

        scores = []
        for start in range(0, len(queries), PASSAGES_AT_ONCE):
            some = slice(start, start + PASSAGES_AT_ONCE)
            sides = rows(self._queries, queries[some]), rows(found, passages[some])
            scores.append(torch.stack([kind.paired(*sides).float().cpu() for kind in SIMILARITIES.values()], dim=1))
        whole: NDArray[np.float32] = torch.cat(scores).numpy()
        return whole
