"""The job `score`: a teacher's score of every (query, passage) pair of the training rows.

Scores come from the cache that mining fills too (pairs.py): what denoising or the audit has paid for is not paid again.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from rayembed.config import Experiment
from rayembed.config.wording import counted
from rayembed.data.storage import write_atomic
from rayembed.data.store import Row, Store
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.inputs import coming_rows, planned_rows, training_rows
from rayembed.jobs.pairs import PairCounts, PairScores, PairSource, counted_scores, sizes_of_parts
from rayembed.jobs.passed_through import (
    in_words,
    passed_through,
    retrieval_rows,
    row_line,
    units_with_others,
    with_others,
    write_lines,
)
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.score_stats import added, distribution, summary, warnings
from rayembed.jobs.session import ray_session
from rayembed.jobs.teacher import check_teacher, kind_of_teacher, teacher_reads, teacher_section, teacher_wording
from rayembed.jobs.units import Work, run_units
from rayembed.jobs.wording import RowTexts, Wording

logger = logging.getLogger(__name__)
SIDES = ("pos", "neg")
COUNTS = "pairs.json"
ROWS_PER_PART = 1024  # of the pairs: not of the rows' store, whose cut must not decide which pairs share a batch


@dataclass(frozen=True)
class Data:
    """What is scored."""

    everything: Store
    """All training rows, in their order."""

    rows: Store
    """Those of retrieval; the others pass through."""

    passed: dict[str, int]
    """How many rows of each dataset pass through."""


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False, rows: Store | None = None) -> Path:
    """Scores the rows that `mine` wrote, or data.train without it; rows of types sts and class pass through.

    Args:
        experiment: sections score, data, model.
        overwrite: replace a folder that was scored from something else.
        rows: that are scored, of a sweep. None: those that the sections name.

    Returns:
        OUTPUT_DIR/score: the same rows with pos_scores and neg_scores, and stats.json.

    Raises:
        ValueError: the data have errors, the teacher cannot score, or the folder was scored from something else.
    """
    check_teacher(experiment)
    data = _data(experiment, training_rows(experiment, after=("mine",))[0] if rows is None else rows)

    def write(folder: Path) -> None:
        with ray_session(experiment):
            _score(experiment, data, folder)

    final = Path(experiment.output_dir) / "score"
    depends_on = reads(experiment, data.everything)
    return written_once(final, depends_on, write, overwrite=overwrite, experiment=experiment, layout=data.rows.layout)


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    config = teacher_section(experiment)
    everything, source = planned_rows(experiment, after=("mine",))
    data = _data(experiment, everything)
    final, coming = Path(experiment.output_dir) / "score", coming_rows(experiment, after=("mine",))
    where = state(final, reads(experiment, everything), overwrite=overwrite, coming=coming)
    pairs = sum(row_pairs(data.rows, teacher_wording(experiment)).sizes)
    others = f"{in_words(data.passed)}; " if data.passed else ""
    return (
        f"score: {counted(data.rows.num_rows, 'row')} of {source}, at most {counted(pairs, 'pair')}, by "
        f"{config.model} ({kind_of_teacher(experiment)}); {others}{where}"
    )


def _data(experiment: Experiment, everything: Store) -> Data:
    passed = passed_through(everything, "score")
    rows = retrieval_rows(everything, Path(experiment.cache()), experiment.encode.queries_per_unit)
    return Data(everything, rows, passed)


def reads(experiment: Experiment, rows: Store) -> Reads:
    """What the result depends on."""
    return {"rows": rows.fingerprint, **teacher_reads(experiment)}


def row_pairs(rows: Store, wording: Wording | None) -> PairSource:
    """Every query with its positives and its negatives.

    Args:
        rows: of retrieval alone, so that the others do not decide which pairs share a batch.
        wording: of the teacher.
    """
    pairs = [np.empty(0, np.int64)]
    for table in rows.iter_parts([*SIDES]):
        pairs.append(sum(pc.list_value_length(table.column(side)).to_numpy() for side in SIDES))
    sizes = sizes_of_parts(np.concatenate(pairs), ROWS_PER_PART)
    told = None if wording is None else asdict(wording)
    arguments = {"rows": str(rows.folder), "fingerprint": rows.fingerprint, "wording": told}
    return PairSource("rayembed.jobs.score:RowPairs", arguments, len(sizes), sizes, worded=True)


class RowPairs:
    """Pairs of ROWS_PER_PART training rows, row by row: the positives, then the negatives."""

    def __init__(self, *, rows: str, fingerprint: str, wording: dict[str, Any] | None) -> None:
        self._rows, self._texts = Store.open(Path(rows)), RowTexts(wording)
        assert self._rows.fingerprint == fingerprint

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part, which is none of the rows' store."""
        last = min((part + 1) * ROWS_PER_PART, self._rows.num_rows)
        rows = self._rows.take(np.arange(part * ROWS_PER_PART, last), ["query", "prompt", "type", *SIDES]).to_pylist()
        return _pairs(rows, self._texts)


def _pairs(rows: Sequence[Row], texts: RowTexts) -> list[tuple[str, str]]:
    return [pair for row in rows for pair in texts.pairs(row, [*row["pos"], *row["neg"]])]


def _score(experiment: Experiment, data: Data, folder: Path) -> None:
    source = row_pairs(data.rows, teacher_wording(experiment))
    scores, counts = counted_scores(experiment, source, what="score")
    if not (folder / COUNTS).exists():  # a resumed job finds in the cache what it has scored itself
        write_atomic(folder / COUNTS, json.dumps(asdict(counts)).encode())
    work = Work(
        what="write scores",
        counted="queries",
        worker="rayembed.jobs.score:WriteWorker",
        arguments={
            "everything": str(data.everything.folder),
            "rows": str(data.rows.folder),
            "scores": str(scores.folder),
            "wording": source.arguments["wording"],
        },
        folder=folder,
    )
    parts = run_units(units_with_others(data.everything, data.rows), work, experiment.ray, use_gpu=False)
    stats = _stats(experiment, PairCounts(**json.loads((folder / COUNTS).read_text())), parts)
    stats["passed_through"] = data.passed
    if data.passed:
        logger.info("score: %s", in_words(data.passed))
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

    def __init__(
        self, *, everything: str, rows: str, scores: str, wording: dict[str, Any] | None, threads: int, use_gpu: bool
    ) -> None:
        self._everything, self._rows = Store.open(Path(everything)), Store.open(Path(rows))
        self._scores, self._texts = PairScores(Path(scores)), RowTexts(wording)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part, with the rows that pass through before, between and after its own."""
        table = self._rows.read_part(spec["part"]).to_pylist()
        pairs = _pairs(table, self._texts)
        scores = self._scores.lookup(pairs)
        missing = np.flatnonzero(np.isnan(scores))
        if missing.size:
            raise ValueError(
                f"{missing.size} of {len(pairs)} pairs have no score in {self._scores.folder}, among them query "
                f"{pairs[missing[0]][0][:80]!r}; the cache was changed meanwhile, run the job again"
            )
        ends = np.cumsum([len(row["pos"]) + len(row["neg"]) for row in table], dtype=np.int64)
        scored = [_with_scores(row, own.tolist()) for row, own in zip(table, np.split(scores, ends)[:-1], strict=True)]
        lines = with_others(self._everything, spec["first"], spec["last"], map(row_line, scored))
        write_lines(folder / f"{name}.jsonl", lines)
        return _counts(scored)


def _with_scores(row: Row, scores: list[float]) -> Row:
    """A row with its positives' and then its negatives' scores."""
    first = len(row["pos"])
    return {**row, "pos_scores": scores[:first], "neg_scores": scores[first:]}


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    """For stats.json: rows, those with a positive on top, the distributions of both sides' scores."""
    agree = sum(max(row["pos_scores"]) >= max(row["neg_scores"], default=-math.inf) for row in rows)
    sides = {side: distribution([score for row in rows for score in row[f"{side}_scores"]]) for side in SIDES}
    return {"rows": len(rows), "agree": agree, **sides}
