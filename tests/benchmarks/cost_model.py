"""What a run takes at sizes that no machine here has: time, GPU-hours, memory, storage; printed for cluster/costs.md.

Run: python -m tests.benchmarks.cost_model
Everything is arithmetic from the constants below, each with the command that measures it; those of a GPU were not
measured (no GPU was at hand), are assumptions of the order of an H100 with a model of 110 million weights, and can be
given: --passages-per-second 4000 --products-per-second 5e13 --rows-per-second 900 --unit-milliseconds 10
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rayembed.search.merge import fold_top_k
from tests.benchmarks.watching import markdown

GB, HOUR = 1e9, 3600.0


@dataclass(frozen=True)
class Constants:
    """Each with the command that measures it."""

    passages_per_second: float = 3000.0
    """A GPU encodes so many, of 200 tokens. Assumed. 98 on 2 CPU cores with MiniLM: tests.benchmarks.mining_peers."""

    products_per_second: float = 5e13
    """A GPU multiplies and adds in search, top-k included. Assumed. 9e10 on 2 cores: tests.benchmarks.mining_scale."""

    rows_per_second: float = 600.0
    """A GPU trains on so many, of 8 passages. Assumed. 13 of 2 passages on 2 cores: tests.benchmarks.train_step."""

    merged_per_second: float = 2.5e7
    """A worker's core merges so many found passages. Measured by --measure, here."""

    unit_milliseconds: float = 10.0
    """Of the driver's CPU for a unit, measured as about 10. tests.benchmarks.units_at_scale."""

    start_seconds: float = 20.0
    """Of a job's Ray and workers, measured as 15 to 28. tests.benchmarks.ray_cost, tests.benchmarks.cluster_times."""


@dataclass(frozen=True)
class Size:
    """What is mined and trained."""

    passages: float
    queries: float
    gpus: int
    dimension: int = 768
    k: int = 200
    weights: float = 110e6
    passages_per_unit: int = 8192
    passages_per_shard: int = 262_144
    batch_per_gpu: int = 64
    group: int = 8

    @property
    def units(self) -> float:
        return self.passages / self.passages_per_unit

    @property
    def shards(self) -> float:
        return max(1.0, self.passages / self.passages_per_shard)


def mining(size: Size, told: Constants) -> tuple[float, ...]:
    """Hours of encoding, of search, of merging, of the driver; GPU-hours; GB on disk; GB in the driver."""
    encode = size.passages / told.passages_per_second / size.gpus
    search = 2 * size.passages * size.queries * size.dimension / told.products_per_second / size.gpus
    merge = size.queries * size.k * size.shards / told.merged_per_second / size.gpus
    driver = size.units * told.unit_milliseconds / 1000
    disk = 4 * size.passages * size.dimension + 12 * size.queries * size.k * size.shards
    memory = 20 * size.passages
    wall = max(encode, driver) + search + merge + 4 * told.start_seconds
    hours = [seconds / HOUR for seconds in (encode, search, merge, driver, wall)]
    return (*hours, hours[-1] * size.gpus, disk / GB, memory / GB)


def training(size: Size, told: Constants) -> tuple[float, ...]:
    """Hours of an epoch, GPU-hours, steps, MB gathered a step, MB of scores held by a worker, GB of a checkpoint."""
    batch = size.batch_per_gpu * size.gpus
    steps = size.queries / batch
    seconds = size.queries / told.rows_per_second / size.gpus + told.start_seconds
    gathered = 4 * batch * size.group * size.dimension
    scores = 4 * min(2**22, size.batch_per_gpu * batch * size.group)
    return seconds / HOUR, seconds * size.gpus / HOUR, steps, gathered / 1e6, scores / 1e6, 12 * size.weights / GB


def merge_rate() -> float:
    """Found passages a second that `fold_top_k` merges here, the best of three."""
    draw, queries, k, shards = np.random.default_rng(0), 512, 200, 33
    tops = [
        (np.sort(draw.random((queries, k), np.float32))[:, ::-1].copy(), draw.integers(0, 10**9, (queries, k)))
        for _ in range(shards)
    ]
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        fold_top_k(tops, k, lambda rows: rows)
        best = max(best, queries * k * shards / (time.perf_counter() - start))
    return best


def figure(value: float) -> str:
    """Three digits."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def tables(told: Constants, passages: Sequence[float], gpus: Sequence[int]) -> str:
    mined, trained = [], []
    for number in passages:
        for workers in gpus:
            size = Size(number, queries=min(number / 10, 1e6), gpus=workers)
            head = (f"{number:,.0f}", f"{size.queries:,.0f}", workers)
            mined.append((*head, *map(figure, mining(size, told))))
    for workers in gpus:
        size = Size(1e6, queries=1e6, gpus=workers)
        trained.append((workers, f"{size.batch_per_gpu * workers:,}", *map(figure, training(size, told))))
    of_mining = (
        "passages",
        "queries",
        "GPUs",
        "encode, h",
        "search, h",
        "merge, h",
        "driver, h",
        "all, h",
        "GPU-hours",
    )
    of_training = ("GPUs", "batch", "an epoch, h", "GPU-hours", "steps", "MB gathered a step", "MB of scores")
    return "\n\n".join(
        [
            markdown((*of_mining, "disk, GB", "driver's memory, GB"), mined),
            markdown((*of_training, "checkpoint, GB"), trained),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Constants):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    parser.add_argument("--passages", type=float, nargs="+", default=(1e6, 1e7, 1e8, 1e9))
    parser.add_argument("--gpus", type=int, nargs="+", default=(1, 8, 64, 512))
    parser.add_argument("--measure", action="store_true", help="print what can be measured here in a second, and end")
    options = parser.parse_args()
    if options.measure:
        print(f"merged_per_second {merge_rate():.3g}")
        return 0
    told = Constants(**{field.name: getattr(options, field.name) for field in fields(Constants)})
    print(tables(told, options.passages, options.gpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
