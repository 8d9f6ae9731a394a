"""A training of seconds: rows of random words, their tokens, and the loop on them in one worker."""

import json
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig, Pooling
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.data.store import ROWS, StoreWriter
from rayembed.data.tokens import write_tokens
from rayembed.models.encoding import tokenize
from rayembed.models.loading import load_tokenizer
from rayembed.training.engine import Engine
from rayembed.training.loop import Worker, train

DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"
PARTS = ("0", "1")


def random_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with one or two positives, three or more negatives, and a teacher's scores."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(40)]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    rows: list[dict[str, Any]] = []
    for number in range(count):
        pos = [text(3, 10) for _ in range(draw.randint(1, 2))]
        neg = [text(3, 10) for _ in range(draw.randint(3, 6))]
        scores = {"pos_scores": [draw.gauss(2, 1) for _ in pos], "neg_scores": [draw.gauss(0, 1) for _ in neg]}
        rows.append({"query_id": str(number), "dataset": "d", "query": text(1, 3), "pos": pos, "neg": neg, **scores})
    return rows


def write_row_tokens(rows: list[dict[str, Any]], model: Path, folder: Path) -> None:
    """Token files of two parts; texts may be longer than what is kept of them."""
    tokenizer = load_tokenizer(str(model), padding_side="right")
    folder.mkdir()
    writer = StoreWriter(folder / "rows", ROWS, len(rows))
    for row in rows:
        writer.add(row)
    writer.finish()
    half = len(rows) // 2
    for part, some in zip(PARTS, (rows[:half], rows[half:]), strict=True):
        write_tokens(
            pa.Table.from_pylist(some, schema=ROWS),
            folder,
            part,
            model=ModelConfig(name_or_path=str(model)),
            tokenize=lambda texts, length: tokenize(tokenizer, texts, length),
            query_max_len=10,
            passage_max_len=24,
        )


def experiment(
    model: Path,
    *,
    workers: int,
    stage: int,
    pooling: Pooling = "cls",
    group: int = 3,
    **train: Any,  # noqa: ANN401 - any setting of the section
) -> Experiment:
    return Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path=str(model), pooling=pooling),
        data=DataConfig(train_group_size=group, query_max_len=10, passage_max_len=24, evaluation="unused"),
        ray=RayConfig(num_workers=workers),
        train=TrainConfig(deepspeed=str(DEEPSPEED / f"zero{stage}.json"), **train),
    )


@dataclass(frozen=True)
class Run:
    """Folders of one run."""

    folder: Path
    tokens: Path

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step}"

    def evaluations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "train" / "evaluations.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics()]

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "train" / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")


class KilledError(Exception):
    """Ends a run in its checkpoint."""


def train_one(setup: Experiment, run: Run, kill_after: int | None = None, resume_after: int | None = None) -> list[int]:
    """The loop in this worker, killed or resumed after a number of steps; at which steps it saved."""
    saved = []

    def save(engine: Engine, state: dict[str, Any], loss: float, figures: dict[str, float] | None) -> None:
        engine.save(run.checkpoint(state["step"]), state)
        (run.checkpoint(state["step"]) / f"loss-{dist.get_rank()}").write_text(str(loss))
        saved.append(state["step"])
        if state["step"] == kill_after:
            raise KilledError

    dev = run.tokens / "dev"
    worker = Worker(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cpu"),
        rows=run.tokens / "rows",
        tokens=run.tokens,
        parts=PARTS,
        train_folder=run.folder / "train",
        model_folder=run.folder / "model",
        probe_texts=(("abc def", "a"),),
        dev=dev if setup.train is not None and setup.train.eval_steps is not None else None,
        checkpoint_of=lambda step: nullcontext(run.checkpoint(step)),
    )
    resume_from = None if resume_after is None else run.checkpoint(resume_after)
    try:
        train(setup, worker, resume_from=resume_from, checkpoint=save)
    except KilledError:
        pass
    return saved
