"""Mining at a size that no process could hold: time, memory of every process, and the result against brute force.

From the repository's root, with the environment that has rayembed:

    python -m tests.benchmarks.mining_scale vectors --folder /tmp/vectors --passages 1000000 --queries 2000 --k 200
    python -m tests.benchmarks.mining_scale texts --folder /tmp/texts --passages 200000 --queries 2000

The first gives all vectors, so that search and merge are measured alone; the second encodes. With --kill N the driver
is killed N times and the same command run again until it ends; after an unbroken run in the same folder the two
results are compared.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks import scale_data
from tests.benchmarks.watching import Watched, checked, markdown, megabytes, memory_table, watch

SAMPLED_QUERIES = 50
SPARE = 50  # of the brute force: passages beyond the k best whose scores are known
ROUNDING = 5e-7  # float32 sums of a few hundred products differ by less, whoever adds them
NOTdef _report(options: argparse.Namespace, watched: Watched, digest: str) -> None:
    kind, peak = watched.largest
    again = f"; the last of {options.kill + 1} runs" if options.kill else ""
    rows: list[tuple[str, str]] = [
        ("what", f"{options.passages:,} {options.what}, {options.queries:,} queries, {options.workers} workers{again}"),
        ("wall time", f"{watched.seconds:.1f} s"),
        *((f"- {name}", f"{seconds:.1f} s") for name, seconds in passes(watched)),
        ("largest process", f"{kind}: {megabytes(peak.rss)} RSS, {megabytes(peak.private)} of it private"),
        ("sha256 of the rows", digest),
    ]
    encoding = dict(passes(watched)).get("encode passages")
    if encoding and not options.kill:
        rows.insert(2, ("texts/s, whole run", f"{options.passages / watched.seconds:,.0f}"))
        rows.insert(3, ("texts/s, encoding", f"{options.passages / encoding:,.0f}"))
    print(markdown(("measure", "value"), rows), memory_table(watched), sep="\n\n", flush=True)


def _compare_runs(options: argparse.Namespace, digest: str, watched: Watched) -> bool:
    whole = options.folder / "whole.json"
    if not options.kill:
        whole.write_text(json.dumps({"sha256": digest, "seconds": watched.seconds}))
        return True
    if not whole.exists():
        print("no unbroken run in this folder to compare with")
        return True
    same = bool(json.loads(whole.read_text())["sha256"] == digest)
    print(f"the unbroken run has {'the same' if same else 'ANOTHER'} sha256")
    return same


def compare_with_brute_force(options: argparse.Namespace, mined: Path) -> bool:
    """Compares sampled queries with all products in float64; prints how many are equal and whether that is well."""
    positives = scale_data.positive_rows(options.passages, options.queries)
    count = min(SAMPLED_QUERIES, options.queries)
    sampled = sorted(np.random.default_rng([6, options.seed]).choice(options.queries, count, replace=False).tolist())
    best = _brute_force(options, sampled)
    wanted = {scale_data.query_id(number) for number in sampled}
    rows = {}
    for path in sorted(mined.glob("part-*.jsonl")):
        with path.open() as file:
            rows.update({row["query_id"]: row for row in map(json.loads, file) if row["query_id"] in wanted})
    equal = rounded = 0
    for number, scores in zip(sampled, best, strict=True):
        own = scale_data.passage_id(positives[number])
        expected = [name for name in list(scores)[: options.k] if name != own]
        found = rows[scale_data.query_id(number)]["neg_ids"]
        equal += found == expected
        rounded += found != expected and _same_but_for_rounding(found, expected, scores)
    print(
        f"\n{equal} of {count} sampled queries have the passages of brute force, place by place; {rounded} differ only "
        f"where two scores are within {ROUNDING:g}; {count - equal - rounded} differ otherwise"
    )
    return equal + rounded == count


def _same_but_for_rounding(found: list[str], expected: list[str], scores: dict[str, float]) -> bool:
    if not len(set(found)) == len(found) == len(expected):
        return False
    return all(abs(scores.get(f, np.inf) - scores[e]) < ROUNDING for f, e in zip(found, expected, strict=True))


def _brute_force(options: argparse.Namespace, sampled: list[int]) -> list[dict[str, float]]:
    """Each query's best passages by score, ties by id, with their scores."""
    queries = np.load(options.folder / "queries.npy", mmap_mode="r")[sampled].astype(np.float64)
    width = options.k + SPARE
    found: list[list[tuple[float, str]]] = [[] for _ in sampled]
    first = 0
    for path in sorted((options.folder / "vectors").glob("*.npy")):
        products = queries @ np.load(path, mmap_mode="r").astype(np.float64).T
        for own, scores in zip(found, products, strict=True):
            bound = np.partition(scores, -width)[-width] if len(scores) > width else -np.inf
            places = np.flatnonzero(scores >= bound).tolist()
            own += [(-float(scores[place]), scale_data.passage_id(first + place)) for place in places]
        first += products.shape[1]
    return [{name: -score for score, name in sorted(own)[:width]} for own in found]


def _rayembed() -> Path:
    return Path(sys.executable).with_name("rayembed")


if __name__ == "__main__":
    sys.exit(main())
