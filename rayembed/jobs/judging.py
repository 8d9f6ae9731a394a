"""The teacher's judgement of mined passages: of all candidates (mine.denoise), or of a sample of what was chosen."""

from collections.abc import Iterator
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
from rayembed.mining.filters import same_text


def judge(mining: Mining, pools: Path) -> tuple[Path, Path]:
    """Scores every row's positives and candidates by the teacher of section score.

    Returns:
        The folder of Judged, and that of the teacher's scores, both in the cache.
    """
    from rayembed.jobs.pairs import PairSource, score_pairs  # workers import this module too, without torch

    experiment, config = mining.experiment, mining.config
    arguments: dict[str, Any] = {
        "rows": str(mining.rows.folder),
        "corpus": str(mining.corpus.folder),
        "pools": str(pools),
        "limit": config.denoise_candidates,
    }
    sizes = []
    for part in range(len(mining.rows.parts)):
        candidates = np.diff(Pools.load(pools, part).offsets)
        limited = np.minimum(candidates, config.denoise_candidates or candidates.max(initial=0))
        sizes.append(int(limited.sum()) + len(candidates))
    source = PairSource("rayembed.jobs.judging:PoolPairs", arguments, len(sizes), tuple(sizes))
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


class PoolPairs:
    """Pairs of a part of the rows: each query with its positives and with the first candidates of its draw."""

    def __init__(self, *, rows: str, corpus: str, pools: str, limit: int | None) -> None:
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._pools, self._limit = Path(pools), limit
        self._repeated = RepeatedQueries(self._rows, same_text)

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part."""
        return [
            (row["query"], text)
            for row, _, candidates in self.of_rows(part, self.pools(part))
            for text in (*row["pos"], *candidates)
        ]

    def pools(self, part: int) -> Pools:
        """The pools of a part."""
        return Pools.load(self._pools, part)

    def of_rows(self, part: int, pools: Pools) -> Iterator[tuple[Row, NDArray[np.int64], list[str]]]:
        """Of each row: the row with the positives of all rows with its query, places in the pools, and their texts."""
        known = self._repeated.with_positives_of_all(self._rows.read_part(part).to_pylist())
        for start in range(0, len(known), QUERIES_AT_ONCE):
            some = range(start, min(start + QUERIES_AT_ONCE, len(known)))
            places = [pools.offsets[i] + pools.order[pools.of(i)][: self._limit] for i in some]
            passages = Passages(self._corpus, pools.rows[np.concatenate(places)])
            for i, own in zip(some, places, strict=True):
                yield known[i], own, passages.of(pools.rows[own])[1]


class JudgeWorker:
    """Brings a part's pools and the teacher's scores together."""

    def __init__(self, *, experiment: str, scores: str, threads: int, use_gpu: bool, **source: Any) -> None:  # noqa: ANN401
        self._config = received(experiment).mine or MineConfig()
        self._source, self._scores = PoolPairs(**source), PairScores(Path(scores))

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one part."""
        pools = self._source.pools(spec["part"])
        scores = np.full(len(pools.rows), np.nan, np.float32)
        bounds = np.full(len(pools.offsets) - 1, np.inf, np.float32)
        for i, (row, places, texts) in enumerate(self._source.of_rows(spec["part"], pools)):
            found = self._scores.lookup([(row["query"], text) for text in (*row["pos"], *texts)])
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
    """Pairs of some rows of a part: each query with its positives and its chosen negatives."""

    def __init__(self, *, rows: str, corpus: str, chosen: str, sample: list[int]) -> None:
        self._rows, self._corpus = Store.open(Path(rows)), Store.open(Path(corpus))
        self._chosen, self._sample = Path(chosen), frozenset(sample)

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part's rows that are in the sample."""
        first, chosen = self._rows.parts[part].first_row, Chosen.load(self._chosen, part)
        found = []
        for i, row in enumerate(self._rows.read_part(part, ["query", "pos"]).to_pylist()):
            if first + i in self._sample:
                negatives = Passages(self._corpus, chosen.rows[chosen.of(i)]).of(chosen.rows[chosen.of(i)])[1]
                found += [(row["query"], text) for text in (*row["pos"], *negatives)]
        return found


def judge_sample(mining: Mining, chosen: Path, sample: frozenset[int]) -> Path:
    """Scores the positives and chosen negatives of some rows by the teacher.

    Returns:
        The folder of the teacher's scores.
    """
    from rayembed.jobs.pairs import PairSource, score_pairs  # workers import this module too, without torch

    arguments = {
        "rows": str(mining.rows.folder),
        "corpus": str(mining.corpus.folder),
        "chosen": str(chosen),
        "sample": sorted(sample),
    }
    sizes = tuple(
        sum(part.first_row <= row < part.first_row + part.num_rows for row in sample)
        * (mining.config.negative_number + 1)
        for part in mining.rows.parts
    )
    source = PairSource("rayembed.jobs.judging:ChosenPairs", arguments, len(sizes), sizes)
    return score_pairs(mining.experiment, source, what="judge a sample").folder
