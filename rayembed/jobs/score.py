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
from rayembed.data.store import Row, Store
from rayembed.data.tasks import OF_OWN_KIND
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.inputs import planned_rows, training_rows
from rayembed.jobs.pairs import PairCounts, PairScores, PairSource, counted_scores, sizes_of_parts
from rayembed.jobs.passed_through import in_words, of_own_kind, passed_through, row_line, write_lines
from rayembed.jobs.score_stats import added, distribution, summary, warnings
from rayembed.jobs.session import ray_session
from rayembed.jobs.teacher import kind_of_teacher, teacher_reads, teacher_section
from rayembed.jobs.units import Unit, Work, run_units

logger = logging.getLogger(__name__)
SIDES = ("pos", "neg")
COUNTS = "pairs.json"
ROWS_PER_PART = 1024  # of the pairs: not of the rows' store, whose cut must not decide which pairs share a batch


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Scores the rows that `mine` wrote, or data.train without it; rows of types sts and class pass through.

    Args:
        experiment: sections score, data, model.
        overwrite: replace a folder that was scored from something else.

    Returns:
        OUTPUT_DIR/score: the same rows with pos_scores and neg_scores, and stats.json.
    """
    teacher_section(experiment)
    rows, _ = training_rows(experiment, after=("mine",))
    passed = passed_through(rows, "score")

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            _score(experiment, rows, passed, folder)

    final = Path(experiment.output_dir) / "score"
    reads = _reads(experiment, rows)
    return written_once(final, reads, write, overwrite=overwrite, experiment=experiment, layout=rows.layout)


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    config = teacher_section(experiment)
    rows, source = planned_rows(experiment, after=("mine",))
    where = state(Path(experiment.output_dir) / "score", _reads(experiment, rows))
    pairs, passed = sum(row_pairs(rows).sizes), passed_through(rows, "score")
    others = f"{in_words(passed)}; " if passed else ""
    return (
        f"score: {rows.num_rows - sum(passed.values()):,} rows of {source}, at most {pairs:,} pairs, by "
        f"{config.model} ({kind_of_teacher(experiment)}); {others}{where}"
    )


def _reads(experiment: Experiment, rows: Store) -> Reads:
    return {"rows": rows.fingerprint, **teacher_reads(experiment)}


def row_pairs(rows: Store) -> PairSource:
    """Every query with its positives and its negatives, of rows of retrieval."""
    pairs = [np.empty(0, np.int64)]
    for table in rows.iter_parts([*SIDES, "type"]):
        both = sum(pc.list_value_length(table.column(side)).to_numpy() for side in SIDES)
        pairs.append(np.where(of_own_kind(table), 0, both))
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
        rows = self._rows.take(np.arange(part * ROWS_PER_PART, last), ["query", *SIDES, "type"]).to_pylist()
        return _pairs(rows)


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [
        (row["query"], text) for row in rows if row["type"] not in OF_OWN_KIND for side in SIDES for text in row[side]
    ]


def _score(experiment: Experiment, rows: Store, passed: dict[str, int], folder: Path) -> None:
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
    stats["passed_through"] = passed
    if passed:
        logger.info("score: %s", in_words(passed))
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
        pairs = _pairs(table)
        scores = self._scores.lookup(pairs)
        missing = np.flatnonzero(np.isnan(scores))
        if missing.size:
            raise ValueError(
                f"{missing.size} of {len(pairs)} pairs have no score in {self._scores.folder}, among them query "
                f"{pairs[missing[0]][0][:80]!r}; the cache was changed meanwhile, run the job again"
            )
        scored = [row for row in table if row["type"] not in OF_OWN_KIND]
        ends = np.cumsum([len(row["pos"]) + len(row["neg"]) for row in scored], dtype=np.int64)
        return write_scored(table, np.split(scores, ends)[:-1], folder / f"{name}.jsonl")


def write_scored(table: list[Row], scores: Sequence[NDArray[np.float32]], path: Path) -> dict[str, Any]:
    """Writes training rows with their scores.

    Args:
        table: the rows.
        scores: of each row of retrieval, its positives' and then its negatives'; the other rows stay as they are.
        path: of the jsonl file.

    Returns:
        For stats.json: rows that were scored, those with a positive on top, the distributions of both sides' scores.
    """
    lines, agree, of_rows = [], 0, iter(scores)
    sides: dict[str, list[float]] = {"pos": [], "neg": []}
    for row in table:
        if row["type"] in OF_OWN_KIND:
            lines.append(row_line(row))
            continue
        own = next(of_rows)
        pos, neg = own[: len(row["pos"])].tolist(), own[len(row["pos"]) :].tolist()
        lines.append(row_line({**row, "pos_scores": pos, "neg_scores": neg}))
        sides["pos"] += pos
        sides["neg"] += neg
        agree += max(pos) >= max(neg, default=-math.inf)
    write_lines(path, lines)
    return {"rows": len(scores), "agree": agree, **{side: distribution(values) for side, values in sides.items()}}
