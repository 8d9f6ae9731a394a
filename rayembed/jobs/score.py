"""The job `score`: a teacher's score of every (query, passage) pair of the training rows.

Scores come from the cache that mining fills too (pairs.py): what denoising or the audit has paid for is not paid again.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.inputs import check_kinds, planned_rows, training_rows
from rayembed.jobs.pairs import PairCounts, PairScores, PairSource, counted_scores, sizes_of_parts
from rayembed.jobs.score_stats import added, distribution, summary, warnings
from rayembed.jobs.session import ray_session
from rayembed.jobs.teacher import kind_of_teacher, teacher_reads, teacher_section
from rayembed.jobs.units import Unit, Work, run_units

logger = logging.getLogger(__name__)
SIDES = ("pos", "neg")
COUNTS = "pairs.json"
ROWS_PER_PART = 1024  # of the pairs: not of the rows' store, whose cut must not decide which pairs share a batch


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Scores the rows that `mine` wrote, or data.train without it.

    Args:
        experiment: sections score, data, model.
        overwrite: replace a folder that was scored from something else.

    Returns:
        OUTPUT_DIR/score: the same rows with pos_scores and neg_scores, and stats.json.
    """
    teacher_section(experiment)
    rows, _ = training_rows(experiment, after=("mine",))
    check_kinds(rows, "score")

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            _score(experiment, rows, folder)

    final = Path(experiment.output_dir) / "score"
    reads = _reads(experiment, rows)
    return written_once(final, reads, write, overwrite=overwrite, experiment=experiment, layout=rows.layout)


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    config = teacher_section(experiment)
    rows, source = planned_rows(experiment, after=("mine",))
    where = state(Path(experiment.output_dir) / "score", _reads(experiment, rows))
    pairs = sum(row_pairs(rows).sizes)
    return (
        f"score: {rows.num_rows:,} rows of {source}, at most {pairs:,} pairs, by {config.model} "
        f"({kind_of_teacher(experiment)}); {where}"
    )


def _reads(experiment: Experiment, rows: Store) -> Reads:
    return {"rows": rows.fingerprint, **teacher_reads(experiment)}


def row_pairs(rows: Store) -> PairSource:
    """Every query with its positives and its negatives."""
    pairs = [np.empty(0, np.int64)]
    for table in rows.iter_parts(SIDES):
        pairs.append(sum(pc.list_value_length(table.column(side)).to_numpy() for side in SIDES))
    sizes = sizes_of_parts(np.concatenate(pairs), ROWS_PER_PART)
    arguments = {"rows": str(rows.folder), "fingerprint": rows.fingerprint}
    return PairSource("rayembed.jobs.score:RowPairs", arguments, len(sizes), sizes)


class RowPairs:
    """Pairs of ROWS_PER_PART training rows, row by row: the positives, then the negatives."""

    def __init__(self, *, rows: str, fingerprint: str) -> None:
        self._rows = Store.open(Path(rows))
        assert self._rows.fingerprint == fingerprint

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part, which is none of the rows' store."""
        last = min((part + 1) * ROWS_PER_PART, self._rows.num_rows)
        rows = self._rows.take(np.arange(part * ROWS_PER_PART, last), ["query", *SIDES]).to_pylist()
        return [(row["query"], text) for row in rows for side in SIDES for text in row[side]]


def _score(experiment: Experiment, rows: Store, folder: Path) -> None:
    scores, counts = counted_scores(experiment, row_pairs(rows), what="score")
    if not (folder / COUNTS).exists():  # a resumed job finds in the cache what it has scored itself
        write_atomic(folder / COUNTS, json.dumps(asdict(counts)).encode())
    work = Work(
        what="write scores",
        counted="queries",
        worker="rayembed.jobs.score:WriteWorker",
        arguments={"rows": str(rows.folder), "scores": str(scores.folder)},
        folder=folder,
    )
    units = [
        Unit(
            f"part-{i:05d}",
            part.num_rows,
            {"part": i},
            f"rows {part.first_row} to {part.first_row + part.num_rows - 1}",
        )
        for i, part in enumerate(rows.parts)
    ]
    parts = run_units(units, work, experiment.ray, use_gpu=False)
    stats = _stats(experiment, PairCounts(**json.loads((folder / COUNTS).read_text())), parts)
    for warning in stats["warnings"]:
        logger.warning("score: %s", warning)
    write_atomic(folder / "stats.json", json.dumps(stats, indent=1).encode())


def _stats(experiment: Experiment, counts: PairCounts, parts: list[dict[str, Any]]) -> dict[str, Any]:
    sides = {side: added([part[side] for part in parts]) for side in SIDES}
    total = {key: sum(part[key] for part in parts) for key in ("rows", "agree")}
    return {
        "teacher": teacher_section(experiment).model,
        "kind": kind_of_teacher(experiment),
        "rows": total["rows"],
        "pairs": counts.pairs,
        "different_pairs": counts.different,
        "taken_from_cache": counts.different - counts.scored,
        "mean_positive_score": sides["pos"]["sum"] / max(sides["pos"]["count"], 1),
        "mean_negative_score": sides["neg"]["sum"] / max(sides["neg"]["count"], 1),
        "rows_with_a_positive_on_top": total["agree"],
        "share_of_rows_with_a_positive_on_top": total["agree"] / max(total["rows"], 1),
        "positive_scores": summary(sides["pos"]),
        "negative_scores": summary(sides["neg"]),
        "warnings": warnings(added(list(sides.values()))),
    }


class WriteWorker:
    """Writes parts of the rows with the scores that are in the cache."""

    def __init__(self, *, rows: str, scores: str, threads: int, use_gpu: bool) -> None:
        self._rows, self._scores = Store.open(Path(rows)), PairScores(Path(scores))

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        table = self._rows.read_part(spec["part"]).to_pylist()
        pairs = [(row["query"], text) for row in table for side in SIDES for text in row[side]]
        scores = self._scores.lookup(pairs)
        missing = np.flatnonzero(np.isnan(scores))
        if missing.size:
            raise ValueError(
                f"{missing.size} of {len(pairs)} pairs have no score in {self._scores.folder}, among them query "
                f"{pairs[missing[0]][0][:80]!r}; the cache was changed meanwhile, run the job again"
            )
        ends = np.cumsum([len(row["pos"]) + len(row["neg"]) for row in table])
        return write_scored(table, np.split(scores, ends[:-1]), folder / f"{name}.jsonl")


def write_scored(table: list[dict[str, Any]], scores: Sequence[NDArray[np.float32]], path: Path) -> dict[str, Any]:
    """Writes training rows with their scores.

    Args:
        table: the rows.
        scores: of each row, its positives' and then its negatives'.
        path: of the jsonl file.

    Returns:
        For stats.json: the rows, those with a positive on top, the distributions of both sides' scores.
    """
    lines, agree = [], 0
    sides: dict[str, list[float]] = {"pos": [], "neg": []}
    for row, own in zip(table, scores, strict=True):
        pos, neg = own[: len(row["pos"])].tolist(), own[len(row["pos"]) :].tolist()
        kept = {key: value for key, value in row.items() if value is not None}
        lines.append(json.dumps({**kept, "pos_scores": pos, "neg_scores": neg}, ensure_ascii=False))
        sides["pos"] += pos
        sides["neg"] += neg
        agree += max(pos) >= max(neg, default=-math.inf)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return {"rows": len(table), "agree": agree, **{side: distribution(values) for side, values in sides.items()}}
