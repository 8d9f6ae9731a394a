"""The job `score`: a teacher's score of every (query, passage) pair of the training rows.

A reranker reads each pair once, pairs of a unit deduplicated and sorted by length. An embedder encodes each different
passage once, and a score is an inner product.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.config.score import ScoreConfig
from rayembed.data.storage import fingerprint, write_atomic
from rayembed.data.store import PASSAGES, SeenHashes, Store, StoreWriter, hash_text, hash_texts
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.inputs import planned_rows, training_rows
from rayembed.jobs.session import ray_session
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vectors import Vectors, encode_store, encoding_reads
from rayembed.models.encoding import Reranker, resolve_dtype, resolve_tokens_per_batch
from rayembed.models.loading import check_length, is_reranker, weights_fingerprint


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Scores the rows that `mine` wrote, or data.train without it.

    Args:
        experiment: sections score, data, model.
        overwrite: replace a folder that was scored from something else.

    Returns:
        OUTPUT_DIR/score: the same rows with pos_scores and neg_scores, and stats.json.
    """
    config = _section(experiment)
    rows, _ = training_rows(experiment, after=("mine",))

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            _score(experiment, config, rows, folder)

    final = Path(experiment.output_dir) / "score"
    reads = _reads(experiment, config, rows)
    return written_once(final, reads, write, overwrite=overwrite, experiment=experiment, layout=rows.layout)


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    config = _section(experiment)
    rows, source = planned_rows(experiment, after=("mine",))
    where = state(Path(experiment.output_dir) / "score", _reads(experiment, config, rows))
    return f"score: {rows.num_rows:,} rows of {source} by {config.model} ({_kind(config)}); {where}"


def _section(experiment: Experiment) -> ScoreConfig:
    if experiment.score is None:
        raise ValueError("the experiment has no section score; add one with score.model, the teacher")
    return experiment.score


def _kind(config: ScoreConfig) -> str:
    if config.kind != "auto":
        return config.kind
    reranker = is_reranker(config.model, trust_remote_code=config.trust_remote_code)
    return "reranker" if reranker else "embedder"


def _reads(experiment: Experiment, config: ScoreConfig, rows: Store) -> Reads:
    kind = _kind(config)
    reads = {"rows": rows.fingerprint, "kind": kind, "max_len": config.max_len, "dtype": experiment.encode.dtype}
    if kind == "reranker":
        return {**reads, "weights": weights_fingerprint(config.model)}
    return {**reads, "teacher": encoding_reads(_teacher(experiment, config))}


def _teacher(experiment: Experiment, config: ScoreConfig) -> Experiment:
    """The experiment with the embedder that teaches in the place of the model: its weights, pooling and prompts."""
    model = ModelConfig(
        name_or_path=config.model,
        pooling=config.pooling,
        query_instruction_for_retrieval=config.query_instruction_for_retrieval,
        passage_instruction_for_retrieval=config.passage_instruction_for_retrieval,
        trust_remote_code=config.trust_remote_code,
    )
    return replace(experiment, model=model, train=None)


def _score(experiment: Experiment, config: ScoreConfig, rows: Store, folder: Path) -> None:
    kind = _kind(config)
    if kind == "reranker":
        check_length(config.model, config.max_len, "score.max_len", trust_remote_code=config.trust_remote_code)
    arguments: dict[str, Any] = {"experiment": shipped(experiment), "rows": str(rows.folder)}
    if kind == "embedder":
        passages = _unique_passages(experiment, rows)
        teacher = _teacher(experiment, config)
        query_vectors = encode_store(teacher, rows, "query")
        passage_vectors = encode_store(teacher, passages, "passage", max_len=config.max_len)
        arguments |= {
            "queries": str(query_vectors.folder),
            "passages": [str(passage_vectors.folder), str(passages.folder)],
        }
    work = Work(
        what=f"score by {kind}",
        counted="queries",
        worker={"reranker": "rayembed.jobs.score:RerankerWorker", "embedder": "rayembed.jobs.score:EmbedderWorker"}[
            kind
        ],
        arguments=arguments,
        folder=folder,
    )
    units = [Unit(f"part-{i:05d}", part.num_rows, {"part": i}) for i, part in enumerate(rows.parts)]
    counts = run_units(units, work, experiment.ray, use_gpu=None if kind == "reranker" else False)
    write_atomic(folder / "stats.json", json.dumps(_stats(counts, config, kind), indent=1).encode())


def _stats(counts: list[dict[str, Any]], config: ScoreConfig, kind: str) -> dict[str, Any]:
    pairs = sum(count["pairs"] for count in counts)
    sums = {
        side: sum(count[side] for count in counts) for side in ("pos", "neg", "pos_sum", "neg_sum", "agree", "rows")
    }
    return {
        "teacher": config.model,
        "kind": kind,
        "rows": sums["rows"],
        "different_pairs": pairs,
        "mean_positive_score": sums["pos_sum"] / max(sums["pos"], 1),
        "mean_negative_score": sums["neg_sum"] / max(sums["neg"], 1),
        "rows_with_a_positive_on_top": sums["agree"],
    }


def _unique_passages(experiment: Experiment, rows: Store) -> Store:
    """Each different passage of the rows once, found again by a hash of its text."""
    folder = Path(experiment.cache()) / f"unique-{fingerprint([rows.fingerprint])}"
    if folder.exists():
        return Store.open(folder)
    writer = StoreWriter(folder, PASSAGES, experiment.encode.passages_per_unit)
    seen = SeenHashes()
    for table in rows.iter_parts(["pos", "neg"]):
        texts = [text for row in table.to_pylist() for text in _texts(row)]
        for text, met in zip(texts, seen.add(hash_texts(texts)), strict=True):
            if not met:
                writer.add({"id": _passage_id(text), "text": text})
    return writer.finish()


class RerankerWorker:
    """Scores parts of the rows by a cross-encoder, each different pair once."""

    def __init__(self, *, experiment: str, rows: str, threads: int, use_gpu: bool) -> None:
        torch.set_num_threads(threads)
        self._experiment = received(experiment)
        self._rows = Store.open(Path(rows))
        self._config = _section(self._experiment)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._teacher = Reranker(
            self._config.model, device=self._device, trust_remote_code=self._config.trust_remote_code
        )

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        table = self._rows.read_part(spec["part"]).to_pylist()
        pairs: dict[tuple[str, str], int] = {}
        wanted = [[pairs.setdefault((row["query"], text), len(pairs)) for text in _texts(row)] for row in table]
        scores = self._teacher.score(
            list(pairs),
            max_len=self._config.max_len,
            tokens_per_batch=resolve_tokens_per_batch(self._experiment.encode.tokens_per_batch, self._device),
            dtype=resolve_dtype(self._experiment.encode.dtype, self._device),
        )
        return write_scored(table, [scores[pair] for pair in wanted], len(pairs), folder / f"{name}.jsonl")


class EmbedderWorker:
    """Scores parts of the rows by the inner products of cached vectors."""

    def __init__(
        self, *, experiment: str, rows: str, queries: str, passages: list[str], threads: int, use_gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self._rows = Store.open(Path(rows))
        self._queries = Vectors(Path(queries), self._rows)
        self._passages = Vectors(Path(passages[0]), Store.open(Path(passages[1])))

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        table = self._rows.read_part(spec["part"]).to_pylist()
        first = self._rows.parts[spec["part"]].first_row
        queries = self._queries.take(np.arange(first, first + len(table)))
        scores, pairs = [], set[tuple[str, int]]()
        for row, query in zip(table, queries, strict=True):
            found = self._passages.store.find_ids([_passage_id(text) for text in _texts(row)])
            scores.append(self._passages.take(found) @ query)
            pairs.update((row["query"], int(passage)) for passage in found)
        return write_scored(table, scores, len(pairs), folder / f"{name}.jsonl")


def write_scored(
    table: list[dict[str, Any]], scores: Sequence[NDArray[np.float32]], pairs: int, path: Path
) -> dict[str, Any]:
    """Writes training rows with their scores.

    Args:
        table: the rows.
        scores: of each row, its positives' and then its negatives'.
        pairs: how many different (query, passage) pairs were scored.
        path: of the jsonl file.

    Returns:
        Counts and sums for stats.json.
    """
    counts = {"pairs": pairs, "rows": len(table), "pos": 0, "neg": 0, "pos_sum": 0.0, "neg_sum": 0.0, "agree": 0}
    lines = []
    for row, own in zip(table, scores, strict=True):
        pos, neg = own[: len(row["pos"])].tolist(), own[len(row["pos"]) :].tolist()
        kept = {key: value for key, value in row.items() if value is not None}
        lines.append(json.dumps({**kept, "pos_scores": pos, "neg_scores": neg}, ensure_ascii=False))
        counts["pos"] += len(pos)
        counts["neg"] += len(neg)
        counts["pos_sum"] += sum(pos)
        counts["neg_sum"] += sum(neg)
        counts["agree"] += max(pos) >= max(neg, default=-math.inf)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return counts


def _texts(row: dict[str, Any]) -> list[str]:
    return [*row["pos"], *row["neg"]]


def _passage_id(text: str) -> str:
    return f"{hash_text(text):016x}"
