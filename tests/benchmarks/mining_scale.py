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
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks import scale_data
from tests.benchmarks.watching import Watched, checked, markdown, megabytes, memory_table, watch

SAMPLED_QUERIES = 50
SPARE = 50  # of the brute force: passages beyond the k best whose scores are known
ROUNDING = 5e-7  # float32 sums of a few hundred products differ by less, whoever adds them
KILLED_WITHIN = 4.0  # seconds after the unit that was waited for: in the middle of another, or between two passes
UNITS_UNKNOWN = 5  # kills come so early where no unbroken run says how many units there are
STAMP = re.compile(r"\d\d:\d\d:\d\d (.+)")
PASS = re.compile(r"(.+): [\d,]+ units of .+ took ")  # the line at a pass's end
PROGRESS = re.compile(r" \(\d+ %\) \| ")
BEFORE = "imports, reading of texts"


def main() -> int:
    """Makes the data where they are not there yet, mines, compares."""
    options = _options()
    experiment = prepare(options)
    name = "run-killed" if options.kill else "run-whole"
    out = options.folder / name
    shutil.rmtree(out, ignore_errors=True)
    command: list[str | Path] = [_rayembed(), "mine", experiment, f"output_dir={out}"]
    if options.kill:
        kill(options, command, out)
    log = options.folder / f"{name}.log"
    watched = checked(watch(command, log=log), log)
    digest = sha256(out / "mine")
    _report(options, watched, digest)
    right = _compare_runs(options, digest, watched)
    if options.what == "vectors":
        right = compare_with_brute_force(options, out / "mine") and right
    return 0 if right else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vectors", "texts"])
    parser.add_argument("--folder", type=Path, required=True, help="data and results; about 3.5 GB a million vectors")
    parser.add_argument("--passages", type=int, help="default: 1,000,000 vectors, 200,000 texts")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--k", type=int, default=200, help="ranks that are mined (vectors)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill", type=int, default=0, help="times that the driver is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills and the sampled queries")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.passages = options.passages or {"vectors": 1_000_000, "texts": 200_000}[options.what]
    return options


def prepare(options: argparse.Namespace) -> Path:
    """Writes data, model and experiment file; data that are there already stay."""
    folder: Path = options.folder
    made_from = {name: getattr(options, name) for name in ("what", "passages", "queries", "dimension")}
    record = folder / "made_from.json"
    if not record.exists() or json.loads(record.read_text()) != made_from:
        for old in ("vectors", "run-whole", "run-killed", "whole.json"):
            path = folder / old
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        positives = scale_data.positive_rows(options.passages, options.queries)
        given = options.what == "vectors"
        texts = (scale_data.numbered_texts if given else scale_data.worded_texts)(options.passages)
        scale_data.write_texts(folder, texts, positives, worded=not given)
        if given:
            scale_data.write_vectors(folder, options.passages, options.dimension, positives)
        scale_data.write_model(folder / "model", options.dimension)
        record.write_text(json.dumps(made_from))
    experiment = folder / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(_experiment(options)))
    return experiment


def _experiment(options: argparse.Namespace) -> dict[str, Any]:
    folder: Path = options.folder
    mine: dict[str, Any] = {"range_for_sampling": "10-210", "negative_number": 15}
    if options.what == "vectors":
        mine = {
            "corpus_embeddings": [str(folder / "vectors")],
            "query_embeddings": [str(folder / "queries.npy")],
            "range_for_sampling": f"0-{options.k}",
            "negative_number": options.k,
            "near_duplicate": None,
            "fill_up": False,
        }
    return {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "pooling": "mean"},
        "data": {"train": [str(folder / "rows.jsonl")], "corpus": [str(folder / "corpus.jsonl")]},
        "mine": mine,
        "ray": {"num_workers": options.workers},
    }


def kill(options: argparse.Namespace, command: list[str | Path], out: Path) -> None:
    """Runs the command and kills it, again and again, each time when more units are done, and a moment later."""
    whole = options.folder / "whole.json"
    units = json.loads(whole.read_text())["units"] if whole.exists() else UNITS_UNKNOWN
    rng = np.random.default_rng(options.seed)
    for number, target in enumerate(sorted(rng.integers(units, size=options.kill).tolist()), start=1):
        moment, log = float(rng.uniform(0, KILLED_WITHIN)), options.folder / f"killed-{number}.log"
        watched = watch(command, log=log, kill_when=Moment(out, target, moment))
        ended = "killed" if watched.status < 0 else f"ended by itself, with status {watched.status},"
        print(
            f"run {number}: {ended} after {watched.seconds:.1f} s; units done: {done_units(out)} of {units}", flush=True
        )


class Moment:
    """Some seconds after so many units are done."""

    def __init__(self, out: Path, units: int, seconds: float) -> None:
        self._out, self._units, self._seconds = out, units, seconds
        self._reached: float | None = None

    def __call__(self) -> bool:
        """Whether it has come."""
        now = time.monotonic()
        if self._reached is None and self._out.exists() and done_units(self._out) >= self._units:
            self._reached = now
        return self._reached is not None and now >= self._reached + self._seconds


def done_units(out: Path) -> int:
    """Units that are marked done in a run folder."""
    return len(list(out.rglob("done/*.json")))


def sha256(folder: Path) -> str:
    """Of all part files, one after the other."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("part-*.jsonl")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def passes(watched: Watched) -> list[tuple[str, float]]:
    """Seconds from the end of one pass to the end of the next; before the first: imports, reading of texts."""
    ends = [(BEFORE, 0.0)]
    for seconds, line in watched.lines:
        stamped = STAMP.match(line)
        found = stamped and PASS.match(stamped[1])
        if found:
            ends.append((found[1], seconds))
        elif stamped and len(ends) == 1 and not PROGRESS.search(line):
            ends[0] = (BEFORE, seconds)
    starts = [0.0, *(seconds for _, seconds in ends)]
    spent = [(name, seconds - start) for (name, seconds), start in zip(ends, starts, strict=False)]
    return [*spent, ("audit, end of Ray", watched.seconds - starts[-1])]


def _report(options: argparse.Namespace, watched: Watched, digest: str) -> None:
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
        units = done_units(options.folder / "run-whole")
        whole.write_text(json.dumps({"sha256": digest, "seconds": watched.seconds, "units": units}))
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
        found: list[str] = rows[scale_data.query_id(number)]["neg_ids"]
        equal += found == expected
        rounded += found != expected and _same_but_for_rounding(found, expected, scores)
    print(
        f"\n{equal} of {count} sampled queries have the passages of brute force, place by place; {rounded} differ only "
        f"where two scores are within {ROUNDING:g}; {count - equal - rounded} differ otherwise"
    )
    return bool(equal + rounded == count)


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
