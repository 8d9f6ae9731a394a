"""The last pass of mining: the training rows with their negatives, and what the audit says of them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayembed.config.mine import MineConfig
from rayembed.data.mirror import all_here
from rayembed.data.storage import write_atomic
from rayembed.data.store import Row, Store
from rayembed.jobs.choice import LATE
from rayembed.jobs.judging import judge_sample
from rayembed.jobs.pair_scores import PairScores
from rayembed.jobs.passed_through import row_line, units_with_others, with_others, write_lines
from rayembed.jobs.pool_files import Chosen, Pools, known
from rayembed.jobs.pools import Mining, Passages, window
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Work, run_units
from rayembed.jobs.wording import RowTexts
from rayembed.mining.audit import Mined, Negative, example_rows, part_audit, summed
from rayembed.mining.filters import filters_of

KEPT = ("query_id", "query", "prompt", "pos", "pos_ids", "dataset", "type", "related_ids", "label")  # as they were
AUDITS = "audits"  # each part's own: together they may be too much for the memory of the driver
AUDITS_AT_ONCE = 100
SAMPLE_STREAM = 2  # of random numbers, beside the one that draws the examples


def write_rows(
    mining: Mining, pools: Path, chosen: Path, folder: Path, *, everything: Store, teacher: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes part-*.jsonl.

    Args:
        mining: what is read.
        pools: folder of the pools.
        chosen: folder of the choice.
        folder: that is written to.
        everything: all training rows; those that are not mined pass through.
        teacher: folder of the teacher's scores of all candidates. None: it judges a sample here, where there is one.

    Returns:
        The audit of all rows, and counts for stats.json.
    """
    from rayembed.jobs.teacher import teacher_wording  # workers import this module too, without torch

    sample = frozenset[int]()
    if teacher is None and mining.experiment.score is not None:
        sample = _sample(mining)
        teacher = judge_sample(mining, chosen, sample) if sample else None
    wording = None if teacher is None else teacher_wording(mining.experiment)
    work = Work(
        what="write rows",
        counted="queries",
        worker="rayembed.jobs.mined_rows:RowWorker",
        arguments={
            "experiment": shipped(mining.experiment),
            "everything": str(everything.folder),
            "rows": str(mining.rows.folder),
            "corpus": str(mining.corpus.folder),
            "pools": str(pools),
            "chosen": str(chosen),
            "teacher": teacher and str(teacher),
            "wording": wording and asdict(wording),
            "sample": sorted(sample),
        },
        folder=folder,
        light=True,
    )
    units = units_with_others(everything, mining.rows)
    counts = run_units(units, work, mining.experiment.ray, use_gpu=False)
    dropped: Counter[str] = Counter()
    for count in counts:
        dropped.update(count["dropped"])
    replaced = sum(count["given_negatives_replaced"] for count in counts)
    return _audit(folder / AUDITS, len(counts)), {
        "given_negatives_replaced": replaced,
        "dropped": dict(sorted((+dropped).items())),
    }


def _audit(folder: Path, parts: int) -> dict[str, Any]:
    """That of all parts, some in memory at a time."""
    total: dict[str, Any] | None = None
    for first in range(0, parts, AUDITS_AT_ONCE):
        some = range(first, min(first + AUDITS_AT_ONCE, parts))
        files = [folder / f"{part:05d}.json" for part in some]
        all_here(files)
        own = [json.loads(file.read_text()) for file in files]
        total = summed(own if total is None else [total, *own])
    assert total is not None, "no training rows"
    return total


def _sample(mining: Mining) -> frozenset[int]:
    """Rows whose negatives the teacher judges for the audit."""
    rng = np.random.default_rng([mining.experiment.seed, SAMPLE_STREAM])
    count = min(mining.config.audit_queries, mining.rows.num_rows)
    return frozenset(rng.choice(mining.rows.num_rows, count, replace=False).tolist())


class RowWorker:
    """Writes the rows of a part."""

    def __init__(
        self,
        *,
        experiment: str,
        everything: str,
        rows: str,
        corpus: str,
        pools: str,
        chosen: str,
        teacher: str | None,
        wording: dict[str, Any] | None,
        sample: list[int],
        threads: int,
        use_gpu: bool,
    ) -> None:
        self._experiment = received(experiment)
        self._config = self._experiment.mine or MineConfig()
        self._everything = Store.open(Path(everything))
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._pools, self._chosen = Path(pools), Path(chosen)
        self._teacher = PairScores(Path(teacher)) if teacher else None
        self._texts = RowTexts(wording)
        self._sample = frozenset(sample)
        self._reasons = (*filters_of(self._config), *LATE)
        self._shown = example_rows(self._rows.num_rows, self._experiment.seed)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part, with the rows that pass through before, between and after its own."""
        first = self._rows.parts[spec["part"]].first_row
        table = self._rows.read_part(spec["part"]).to_pylist()
        pools, chosen = Pools.load(self._pools, spec["part"]), Chosen.load(self._chosen, spec["part"])
        dropped = np.concatenate([pools.dropped, chosen.dropped], axis=1)
        passages = Passages(self._corpus, chosen.rows)
        mined = [
            self._mined(row, first + i, pools.positives_of(i), _negatives(chosen, i, passages), dropped[i].tolist())
            for i, row in enumerate(table)
        ]
        lines = (row_line(_mined_row(row, own.negatives)) for row, own in zip(table, mined, strict=True))
        in_order = with_others(self._everything, spec["first"], spec["last"], lines)
        write_lines(folder / f"{name}.jsonl", in_order)
        first_rank, last_rank = window(self._config)
        shown = [i for i in range(len(table)) if first + i in self._shown]
        audit = part_audit(mined, first_rank=first_rank, last_rank=last_rank, shown=shown)
        write_atomic(folder / AUDITS / f"{spec['part']:05d}.json", json.dumps(audit).encode())
        return {
            "dropped": dict(zip(self._reasons, dropped.sum(axis=0).tolist(), strict=True)),
            "given_negatives_replaced": sum(len(row["neg"]) for row in table),
        }

    def _mined(
        self, row: Row, number: int, positives: list[float | None], negatives: list[Negative], dropped: list[int]
    ) -> Mined:
        judged = self._teacher is not None and (not self._sample or number in self._sample)
        texts = [*row["pos"], *(negative.text for negative in negatives)]
        scores: Sequence[float | None] = [None] * len(texts)
        if judged and self._teacher is not None:
            scores = [known(score) for score in self._teacher.lookup(self._texts.pairs(row, texts))]
        of_negatives = zip(negatives, scores[len(row["pos"]) :], strict=True)
        return Mined(
            query_id=row["query_id"],
            query=row["query"],
            positives=row["pos"],
            positive_ids=row["pos_ids"],
            positive_scores=positives,
            positive_teacher=list(scores[: len(row["pos"])]),
            negatives=[replace(negative, teacher=score) for negative, score in of_negatives],
            wanted=self._config.negative_number,
            dropped={name: count for name, count in zip(self._reasons, dropped, strict=True) if count},
        )


def _negatives(chosen: Chosen, row: int, passages: Passages) -> list[Negative]:
    """Of one row, not judged yet."""
    own = chosen.of(row)
    ids, texts = passages.of(chosen.rows[own])
    values = zip(chosen.rows[own].tolist(), ids, texts, chosen.ranks[own].tolist(), chosen.scores[own], strict=True)
    return [
        Negative(number, name, text, None if rank < 0 else rank, known(score), None)
        for number, name, text, rank, score in values
    ]


def _mined_row(row: Row, negatives: Sequence[Negative]) -> dict[str, Any]:
    """The row with new negatives; scores of the old ones would be wrong and are left out."""
    kept = {key: row.get(key) for key in KEPT}
    return {**kept, "neg": [n.text for n in negatives], "neg_ids": [n.id for n in negatives]}
