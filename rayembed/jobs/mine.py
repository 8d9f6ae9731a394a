"""The job `mine`: hard negatives for every training row, as rows in the training format.

Encode queries and corpus, search every shard, then for each block of queries merge, filter, draw. The result depends on
seed, model, corpus and rows alone: the draws of a query are seeded by its id.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rayembed.config import Experiment
from rayembed.config.jobs import MineConfig
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.jobs import estimates
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.ranking import ShardTops, search_shards
from rayembed.jobs.session import ray_session
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vectors import encode_store
from rayembed.mining.filters import Candidate, Query, same_text
from rayembed.mining.selection import query_seed, select
from rayembed.models.loading import pooling_of, weights_fingerprint

KEPT = ("query_id", "query", "prompt", "pos", "pos_ids", "dataset", "type")  # of a row, as it was


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Mines hard negatives.

    Args:
        experiment: sections mine, data, model.
        overwrite: replace a folder that was mined from something else.

    Returns:
        OUTPUT_DIR/mine: part-*.jsonl in the training format, and stats.json.

    Raises:
        ValueError: the data have errors, or the folder was mined from something else.
    """
    config = _section(experiment)
    prepared = _data(experiment)
    final = Path(experiment.output_dir) / "mine"

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            _mine(experiment, config, prepared, folder)

    return written_once(final, _reads(experiment, config, prepared), write, overwrite=overwrite)


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    config = _section(experiment)
    prepared = _data(experiment)
    assert prepared.rows is not None
    assert prepared.corpus is not None
    rows, corpus = prepared.rows, prepared.corpus
    where = state(Path(experiment.output_dir) / "mine", _reads(experiment, config, prepared))
    return (
        f"mine: {rows.num_rows:,} queries against {corpus.num_rows:,} passages in {len(corpus.parts)} units, "
        f"{config.negative_number} negatives a query from ranks {config.range_for_sampling}; "
        f"{estimates.encoding(experiment, rows, 'query', corpus)}; {where}"
    )


def _section(experiment: Experiment) -> MineConfig:
    return experiment.mine or MineConfig()


def _data(experiment: Experiment) -> Prepared:
    prepared = prepare(experiment, evaluation=False)
    prepared.report.raise_if_errors()
    if prepared.rows is None or prepared.corpus is None:
        raise ValueError("mine needs training rows; set data.train")
    return prepared


def _reads(experiment: Experiment, config: MineConfig, prepared: Prepared) -> Reads:
    assert prepared.rows is not None
    assert prepared.corpus is not None
    model = {key: value for key, value in asdict(experiment.model).items() if key not in ("name_or_path", "dropout")}
    return {
        "rows": prepared.rows.fingerprint,
        "corpus": prepared.corpus.fingerprint,
        "weights": weights_fingerprint(config.model or experiment.model.name_or_path),
        "model": {**model, "pooling": pooling_of(experiment.model)},
        "max_len": [experiment.max_len("query"), experiment.max_len("passage")],
        "dtype": experiment.encode.dtype,
        "mine": asdict(config),
        "seed": experiment.seed,
    }


def _mine(experiment: Experiment, config: MineConfig, prepared: Prepared, folder: Path) -> None:
    rows, corpus = prepared.rows, prepared.corpus
    assert rows is not None
    assert corpus is not None
    queries = encode_store(experiment, rows, "query", model=config.model)
    passages = encode_store(experiment, corpus, "passage", model=config.model)
    last = int(config.range_for_sampling.split("-")[1])
    tops = search_shards(experiment, queries, passages, last, use_gpu=config.use_gpu_for_searching)
    units = [Unit(f"part-{i:05d}", part.num_rows, {"part": i}) for i, part in enumerate(rows.parts)]
    work = Work(
        what="select negatives",
        counted="queries",
        worker="rayembed.jobs.mine:SelectWorker",
        arguments={
            "experiment": shipped(experiment),
            "rows": str(rows.folder),
            "corpus": str(corpus.folder),
            "tops": str(tops),
        },
        folder=folder,
    )
    counts = run_units(units, work, experiment.ray, use_gpu=False)
    stats = _stats(counts, rows, corpus, config)
    write_atomic(folder / "stats.json", json.dumps(stats, indent=1).encode())


def _stats(counts: Sequence[dict[str, Any]], rows: Store, corpus: Store, config: MineConfig) -> dict[str, Any]:
    totals = {
        key: sum(count[key] for count in counts) for key in ("negatives", "filled_up", "short_by", "queries_short")
    }
    dropped: Counter[str] = Counter()
    for count in counts:
        dropped.update(count["dropped"])
    return {
        "queries": rows.num_rows,
        "passages": corpus.num_rows,
        **totals,
        "range_for_sampling": config.range_for_sampling,
        "dropped": dict(sorted(dropped.items())),
    }


class SelectWorker:
    """Merges the shards' rankings for a block of training rows and writes the rows with their negatives."""

    def __init__(self, *, experiment: str, rows: str, corpus: str, tops: str, threads: int, use_gpu: bool) -> None:
        self._experiment = received(experiment)
        self._config = _section(self._experiment)
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._tops = ShardTops(Path(tops), self._corpus)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        part = self._rows.parts[spec["part"]]
        table = self._rows.read_part(spec["part"]).to_pylist()
        first, last = map(int, self._config.range_for_sampling.split("-"))
        merged = self._tops.merged(part.first_row, part.first_row + part.num_rows, last)
        lines, dropped = [], Counter[str]()
        counts = {"negatives": 0, "filled_up": 0, "short_by": 0, "queries_short": 0}
        for row, (scores, found) in zip(table, merged, strict=True):
            candidates = self._candidates(found[first:last], scores[first:last], first)
            selection = select(
                _query(row),
                candidates,
                number=self._config.negative_number,
                seed=query_seed(self._experiment.seed, row["query_id"]),
                draw=self._draw if self._config.fill_up else None,
            )
            lines.append(json.dumps(_mined(row, selection.negatives), ensure_ascii=False))
            dropped.update(selection.dropped)
            counts["negatives"] += len(selection.negatives)
            counts["filled_up"] += selection.filled_up
            counts["short_by"] += selection.short_by
            counts["queries_short"] += selection.short_by > 0
        write_atomic(folder / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
        return {**counts, "dropped": dropped}

    def _candidates(self, rows: Any, scores: Any, first_rank: int) -> list[Candidate]:  # noqa: ANN401
        passages = self._corpus.take(np.asarray(rows, np.int64)).to_pylist()
        return [
            Candidate(passage["id"], passage["text"], first_rank + i, float(score))
            for i, (passage, score) in enumerate(zip(passages, scores, strict=True))
        ]

    def _draw(self, rng: np.random.Generator, count: int) -> list[Candidate]:
        rows = rng.integers(self._corpus.num_rows, size=count)
        return [Candidate(p["id"], p["text"], -1, float("nan")) for p in self._corpus.take(rows).to_pylist()]


def _query(row: dict[str, Any]) -> Query:
    return Query(
        row["query"],
        frozenset(row["pos_ids"] or ()),
        frozenset(same_text(text) for text in row["pos"]),
    )


def _mined(row: dict[str, Any], negatives: Sequence[Candidate]) -> dict[str, Any]:
    """The row with new negatives; scores of the old ones would be wrong and are left out."""
    kept = {key: row[key] for key in KEPT if row[key] is not None}
    return {**kept, "neg": [c.text for c in negatives], "neg_ids": [c.id for c in negatives]}
