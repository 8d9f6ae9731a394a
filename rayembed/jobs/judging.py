"""The teacher's judgement of mined passages: of all candidates (mine.denoise), or of a sample of what was chosen."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config.mine import MineConfig
from rayembed.data.repeated_queries import RepeatedQueries
from rayembed.data.storage import fingerprint
from rayembed.data.store import Row, Store
from rayembed.jobs.pair_scores import PairScores
from rayembed.jobs.pool_files import Chosen, Judged, Pools
from rayembed.jobs.pools import QUERIES_AT_ONCE, Mining, Passages, measured_from, row_units
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Work, run_units
from rayembed.jobs.wording import RowTexts
from rayembed.mining.filters import same_text

ROWS_PER_PART = 256  # of the pairs: not of the rows' store, whose cut must not decide which pairs share a batch


def judge(mining: Mining, pools: Path) -> tuple[Path, Path]:
    """Scores every row's positives and candidates by the teacher of section score.

    Returns:
        The folder of Judged, and that of the teacher's scores, both in the cache.
    """
    from rayembed.jobs.pairs import (
        PairSource,
        score_pairs,
        sizes_of_parts,
    )  # workers import this module too, without torch
    from rayembed.jobs.teacher import teacher_wording

    experiment, config = mining.experiment, mining.config
    arguments: dict[str, Any] = {
        "rows": str(mining.rows.folder),
        "corpus": str(mining.corpus.folder),
        "pools": str(pools),
        "limit": config.denoise_candidates,
        "wording": (wording := teacher_wording(experiment)) and asdict(wording),
    }
    sizes = sizes_of_parts(_pairs_of_rows(mining.rows, pools, config.denoise_candidates), ROWS_PER_PART)
    source = PairSource("rayembed.jobs.judging:PoolPairs", arguments, len(sizes), sizes, worded=True)
    scores = score_pairs(experiment, source, what="judge candidates")
    bounds = [config.denoise_margin, config.denoise_max_score, config.margin_positive]
    folder = Path(experiment.cache()) / f"judged-{fingerprint([pools.name, scores.folder.name, arguments, bounds])}"
    work = Work(
        what="compare with positives",
        counted="queries",
        worker="rayembed.jobs.judging:JudgeWorker",
        arguments={**arguments, "experiment": shipped(experiment), "scores": str(scores.folder)},
        folder=folder,
        light=True,
    )
    run_units(row_units(mining.rows), work, experiment.ray, use_gpu=False)
    return folder, scores.folder


def _pairs_of_rows(rows: Store, pools: Path, limit: int | None) -> NDArray[np.int64]:
    """Pairs of each row, with one positive."""
    found = [np.empty(0, np.int64)]
    for part in range(len(rows.parts)):
        candidates = np.diff(Pools.load(pools, part).offsets)
        found.append(1 + np.minimum(candidates, limit or candidates.max(initial=0)))
    return np.concatenate(found)


class PoolPairs:
    """Pairs of ROWS_PER_PART rows: each query with its positives and with the first candidates of its draw."""

    def __init__(
        self, *, rows: str, corpus: str, pools: str, limit: int | None, wording: dict[str, Any] | None
    ) -> None:
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._pools, self._limit, self.texts = Path(pools), limit, RowTexts(wording)
        self._repeated = RepeatedQueries(self._rows, same_text)
        self._loaded: tuple[int, Pools] | None = None

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part, which is none of the rows' store."""
        found = []
        last = min((part + 1) * ROWS_PER_PART, self._rows.num_rows)
        for stored, start, stop in self._rows.pieces(part * ROWS_PER_PART, last):
            for row, _, candidates in self.of_rows(stored, self.pools(stored), start, stop):
                found += self.texts.pairs(row, [*row["pos"], *candidates])
        return found

    def pools(self, stored: int) -> Pools:
        """The pools of a part of the rows' store."""
        if self._loaded is None or self._loaded[0] != stored:  # several parts of the pairs are of one of the store
            self._loaded = stored, Pools.load(self._pools, stored)
        return self._loaded[1]

    def of_rows(
        self, stored: int, pools: Pools, first: int, last: int
    ) -> Iterator[tuple[Row, NDArray[np.int64], list[str]]]:
        """Of rows `first` to `last` - 1 of a part of the rows' store, what there is to judge.

        Returns:
            Each row with the positives of all rows with its query, places in the pools, and their passages' texts.
        """
        table = self._rows.read_part(stored)
        for start in range(first, last, QUERIES_AT_ONCE):
            some = range(start, min(start + QUERIES_AT_ONCE, last))
            known = self._repeated.with_positives_of_all(table.slice(start, len(some)).to_pylist())
            places = [pools.offsets[i] + pools.order[pools.of(i)][: self._limit] for i in some]
            passages = Passages(self._corpus, pools.rows[np.concatenate(places)])
            for row, own in zip(known, places, strict=True):
                yield row, own, passages.of(pools.rows[own])[1]


class JudgeWorker:
    """Brings a part's pools and the teacher's scores together."""

    def __init__(
        self,
        *,
        experiment: str,
        rows: str,
        corpus: str,
        pools: str,
        limit: int | None,
        wording: dict[str, Any] | None,
        scores: str,
        threads: int,
        use_gpu: bool,
    ) -> None:
        self._config = received(experiment).mine or MineConfig()
        self._source = PoolPairs(rows=rows, corpus=corpus, pools=pools, limit=limit, wording=wording)
        self._scores = PairScores(Path(scores))

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        pools = self._source.pools(spec["part"])
        scores = np.full(len(pools.rows), np.nan, np.float32)
        bounds = np.full(len(pools.offsets) - 1, np.inf, np.float32)
        of_rows = self._source.of_rows(spec["part"], pools, 0, len(bounds))
        for i, (row, places, texts) in enumerate(of_rows):
            found = self._scores.lookup(self._source.texts.pairs(row, [*row["pos"], *texts]))
            scores[places] = found[len(row["pos"]) :]
            bounds[i] = self._bound(found[: len(row["pos"])].tolist())
        Judged(scores, bounds).save(folder, spec["part"])
        return {"judged": int(np.sum(~np.isnan(scores)))}

    def _bound(self, positives: list[float]) -> float:
        limits = [] if self._config.denoise_max_score is None else [self._config.denoise_max_score]
        if self._config.denoise_margin is not None:
            positive = measured_from(positives, self._config)
            assert positive is not None, "the teacher has scored every positive"
            limits.append(positive - self._config.denoise_margin)
        return min(limits)


class ChosenPairs:
    """Pairs of ROWS_PER_PART rows of a sample: each query with its positives and its chosen negatives."""

    def __init__(
        self, *, rows: str, corpus: str, chosen: str, sample: list[int], wording: dict[str, Any] | None
    ) -> None:
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._chosen, self._sample, self._texts = Path(chosen), sample, RowTexts(wording)

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part, which is one of the sample in the order of its rows."""
        sample = self._sample[part * ROWS_PER_PART :][:ROWS_PER_PART]
        rows = self._rows.take(np.array(sample), ["query", "prompt", "type", "pos"]).to_pylist()
        found = []
        for number, row in zip(sample, rows, strict=True):
            ((stored, place, _),) = self._rows.pieces(number, number + 1)
            chosen = Chosen.load(self._chosen, stored)
            own = chosen.rows[chosen.of(place)]
            found += self._texts.pairs(row, [*row["pos"], *Passages(self._corpus, own).of(own)[1]])
        return found


def judge_sample(mining: Mining, chosen: Path, sample: frozenset[int]) -> Path:
    """Scores the positives and chosen negatives of some rows by the teacher.

    Returns:
        The folder of the teacher's scores.
    """
    from rayembed.jobs.pairs import (
        PairSource,
        score_pairs,
        sizes_of_parts,
    )  # workers import this module too, without torch
    from rayembed.jobs.teacher import teacher_wording

    arguments = {
        "rows": str(mining.rows.folder),
        "corpus": str(mining.corpus.folder),
        "chosen": str(chosen),
        "sample": sorted(sample),
        "wording": (wording := teacher_wording(mining.experiment)) and asdict(wording),
    }
    sizes = sizes_of_parts(np.full(len(sample), mining.config.negative_number + 1), ROWS_PER_PART)
    source = PairSource("rayembed.jobs.judging:ChosenPairs", arguments, len(sizes), sizes, worded=True)
    return score_pairs(mining.experiment, source, what="judge a sample").folder
