"""The job `mine`: hard negatives for every training row, as rows in the training format.

Encode queries and corpus, search every shard, then for each block of queries merge, filter, draw. The result depends on
seed, model, corpus and rows alone: the draws of a query are seeded by its id.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.data.prepare import Prepared, prepare
from rayembed.data.repeated_queries import RepeatedQueries
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.jobs import estimates
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.ranking import ShardTops, search_shards
from rayembed.jobs.session import ray_session
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vectors import encode_store, encoding_reads
from rayembed.mining.audit import example, example_rows, histograms, summed
from rayembed.mining.filters import Candidate, Query, same_text
from rayembed.mining.selection import query_seed, select
from rayembed.search.merge import Top

logger = logging.getLogger(__name__)
KEPT = ("query_id", "query", "prompt", "pos", "pos_ids", "dataset", "type")  # of a row, as it was
COUNTED = (
    *("negatives", "filled_up", "short_by", "queries_short"),
    *("given_negatives_replaced", "positives", "positives_ranked"),
)


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Mines hard negatives.

    Args:
        experiment: sections mine, data, model.
        overwrite: replace a folder that was mined from something else.

    Returns:
        OUTPUT_DIR/mine: part-*.jsonl in the training format, stats.json, and audit.html to look at.

    Raises:
        ValueError: the data have errors, or the folder was mined from something else.
    """
    config = _section(experiment)
    prepared = _data(experiment)
    final = Path(experiment.output_dir) / "mine"

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            _mine(experiment, config, prepared, folder)

    assert prepared.rows is not None
    reads = _reads(experiment, config, prepared)
    return written_once(final, reads, write, overwrite=overwrite, experiment=experiment, layout=prepared.rows.layout)


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
    elsewhere = ("model", "use_gpu_for_searching")  # the model by its weights; where it is searched changes nothing
    return {
        "rows": prepared.rows.fingerprint,
        "corpus": prepared.corpus.fingerprint,
        **encoding_reads(experiment, config.model or experiment.model.name_or_path),
        "mine": {key: value for key, value in asdict(config).items() if key not in elsewhere},
        "seed": experiment.seed,
    }


def _mine(experiment: Experiment, config: MineConfig, prepared: Prepared, folder: Path) -> None:
    rows, corpus = prepared.rows, prepared.corpus
    assert rows is not None
    assert corpus is not None
    queries = encode_store(experiment, rows, "query", model=config.model)
    passages = encode_store(experiment, corpus, "passage", model=config.model)
    _, last = _window(config)
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
    if stats["given_negatives_replaced"]:
        logger.warning(
            "mine: %d negatives that the rows brought are replaced by mined ones", stats["given_negatives_replaced"]
        )
    _write_audit(folder / "audit.html", experiment, config, stats, counts)


def _stats(counts: Sequence[dict[str, Any]], rows: Store, corpus: Store, config: MineConfig) -> dict[str, Any]:
    totals = {key: sum(count[key] for count in counts) for key in COUNTED}
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


def _write_audit(
    path: Path, experiment: Experiment, config: MineConfig, stats: dict[str, Any], counts: Sequence[dict[str, Any]]
) -> None:
    from rayembed.report import audit_page  # workers import this module too, and have no use for plots

    first, last = _window(config)
    page = audit_page(
        f"{Path(experiment.output_dir).name}: mined negatives",
        stats,
        summed([count["histograms"] for count in counts]),
        [shown for count in counts for shown in count["examples"]],
        window=(first, last),
    )
    write_atomic(path, page.encode())


def _window(config: MineConfig) -> tuple[int, int]:
    first, last = map(int, config.range_for_sampling.split("-"))
    return first, last


class SelectWorker:
    """Merges the shards' rankings for a block of training rows and writes the rows with their negatives."""

    def __init__(self, *, experiment: str, rows: str, corpus: str, tops: str, threads: int, use_gpu: bool) -> None:
        self._experiment = received(experiment)
        self._config = _section(self._experiment)
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._tops = ShardTops(Path(tops), self._corpus)
        self._repeated = RepeatedQueries(self._rows, same_text)
        self._shown = example_rows(self._rows.num_rows, self._experiment.seed)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        part = self._rows.parts[spec["part"]]
        table = self._rows.read_part(spec["part"]).to_pylist()
        first, last = _window(self._config)
        merged = self._tops.merged(part.first_row, part.first_row + part.num_rows, last)
        lines, dropped, chosen, examples = [], Counter[str](), list[Candidate](), []
        counts = dict.fromkeys(COUNTED, 0)
        known = self._repeated.with_positives_of_all(table)
        for i, (row, (scores, found)) in enumerate(zip(known, merged, strict=True)):
            selection = select(
                _query(row),
                self._candidates(found[first:last], scores[first:last], first),
                number=self._config.negative_number,
                seed=query_seed(self._experiment.seed, row["query_id"]),
                draw=self._draw if self._config.fill_up else None,
            )
            lines.append(json.dumps(_mined(table[i], selection.negatives), ensure_ascii=False))
            if part.first_row + i in self._shown:
                examples.append(example(row["query"], table[i]["pos"], selection.negatives))
            chosen += selection.negatives
            dropped.update(selection.dropped)
            counts["filled_up"] += selection.filled_up
            counts["short_by"] += selection.short_by
            counts["queries_short"] += selection.short_by > 0
        scored = self._positive_scores(table, merged)
        counts |= {
            "negatives": len(chosen),
            "given_negatives_replaced": sum(len(row["neg"]) for row in table),
            "positives": sum(len(row["pos"]) for row in table),
            "positives_ranked": len(scored),
        }
        write_atomic(folder / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
        shape = histograms(chosen, scored, first_rank=first, last_rank=last)
        return {**counts, "dropped": dropped, "histograms": shape, "examples": examples}

    def _positive_scores(self, table: list[dict[str, Any]], merged: list[Top]) -> list[float]:
        """Scores of the positives that are among the ranked passages, found by id; others have no known score."""
        ids = [(i, name) for i, row in enumerate(table) for name in row["pos_ids"] or ()]
        numbers = self._corpus.find_ids([name for _, name in ids])
        return [
            float(score)
            for (i, _), number in zip(ids, numbers, strict=True)
            for score in merged[i][0][merged[i][1] == number]
        ]

    def _candidates(self, rows: NDArray[np.int64], scores: NDArray[np.float32], first_rank: int) -> list[Candidate]:
        passages = self._corpus.take(rows).to_pylist()
        return [
            Candidate(passage["id"], passage["text"], first_rank + i, float(score))
            for i, (passage, score) in enumerate(zip(passages, scores, strict=True))
        ]

    def _draw(self, rng: np.random.Generator, count: int) -> list[Candidate]:
        rows = rng.integers(self._corpus.num_rows, size=count)
        return [Candidate(p["id"], p["text"], -1, float("nan")) for p in self._corpus.take(rows).to_pylist()]


def _query(row: dict[str, Any]) -> Query:
    """What filters may know of a row that has the positives of all rows with its query."""
    return Query(
        row["query"],
        frozenset(row["pos_ids"] or ()),
        frozenset(same_text(text) for text in row["pos"]),
    )


def _mined(row: dict[str, Any], negatives: Sequence[Candidate]) -> dict[str, Any]:
    """The row with new negatives; scores of the old ones would be wrong and are left out."""
    kept = {key: row[key] for key in KEPT if row[key] is not None}
    return {**kept, "neg": [c.text for c in negatives], "neg_ids": [c.id for c in negatives]}
