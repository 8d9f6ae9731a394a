"""Rows of MedQuAD for `train_step`, written once for all contestants: in our store and tokens, and as jsonl for peers.

Each row has one positive and one negative, no text occurs twice, and no query is cut: then FlagEmbedding's random
negative, sentence-transformers' one length for all texts, and our masking of same texts change nothing, and all
contestants compute the same loss.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.data.plan import BatchPlan
from rayembed.data.store import ROWS, StoreWriter
from rayembed.data.tokens import write_tokens
from rayembed.models.encoding import tokenize
from rayembed.training.loop import Worker
from tests.benchmarks.medquad_subset import Beir, write_lines

GROUP, QUERY_MAX_LEN, PASSAGE_MAX_LEN, TEMPERATURE, SEED = 2, 64, 256, 0.02, 42
ANY, SHORT, MIDDLE, LONG = (1, 10**6), (16, 48), (49, 128), (200, 10**6)  # tokens of a passage, special ones included


@dataclass(frozen=True)
class Lengths:
    """Token counts of each batch, text by text."""

    queries: list[list[int]]
    passages: list[list[int]]

    def tokens(self, batch: int) -> int:
        """Real ones, of queries and passages."""
        return sum(self.queries[batch]) + sum(self.passages[batch])


def band(kind: str, place: int) -> tuple[int, int]:
    """Least and most tokens of both passages of the row at a place of its batch.

    `medquad` takes passages as they come: 160 tokens on average, 5 % under 42, half over 180. `mixed` takes, of every
    16 rows, one of long passages, which are cut at PASSAGE_MAX_LEN, eight of short ones and seven between.
    """
    if kind == "medquad":
        return ANY
    if place % 16 == 0:
        return LONG
    return SHORT if place % 2 else MIDDLE


def chosen(
    beir: Beir, tokenizer: PreTrainedTokenizerBase, kind: str, *, batches: int, queries: int
) -> list[list[dict[str, Any]]]:
    """Rows of each batch, in an order that is the same for all contestants.

    Raises:
        ValueError: there are too few texts of a length.
    """
    judged = beir.qrels["train"]
    draw = random.Random(f"train step {kind}")
    names, others = sorted(judged), sorted(beir.passages)
    draw.shuffle(names)
    draw.shuffle(others)
    seen: set[str] = set()
    waiting: dict[tuple[int, int], Iterator[dict[str, Any]]] = {
        own: _rows(beir, tokenizer, names, others, own, seen) for own in {band(kind, i) for i in range(16)}
    }
    found = []
    for _ in range(batches):
        batch = [next(waiting[band(kind, place)], None) for place in range(queries)]
        if None in batch:
            raise ValueError(f"MedQuAD has too few texts for {batches} batches of {queries} queries of kind {kind}")
        found.append([row for row in batch if row is not None])
    return found


def _rows(
    beir: Beir,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    others: Sequence[str],
    wanted: tuple[int, int],
    seen: set[str],
) -> Iterator[dict[str, Any]]:
    """Rows of passages of some lengths; texts in `seen` are not taken, and those that are taken go there."""

    def fits(text: str, least: int, most: int) -> bool:
        return text not in seen and least <= len(tokenize(tokenizer, [text], 10**6)[0]) <= most

    negatives = (beir.passages[name]["text"] for name in others)
    for name in names:
        query, positive = beir.queries[name], beir.passages[beir.qrels["train"][name][0]]["text"]
        if not (fits(query, 1, QUERY_MAX_LEN) and fits(positive, *wanted)):
            continue
        own = {beir.passages[passage]["text"] for passage in beir.qrels["train"][name]}
        negative = next((text for text in negatives if text not in own and fits(text, *wanted)), None)
        if negative is None:
            return
        seen.update((query, positive, negative))
        yield {"query_id": name, "dataset": "medquad", "query": query, "pos": [positive], "neg": [negative]}


def longest_first(
    batches: Sequence[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> list[list[dict[str, Any]]]:
    """The batches, that of most tokens before the others."""

    def tokens(batch: list[dict[str, Any]]) -> int:
        texts = [text for row in batch for text in (row["query"], *row["pos"], *row["neg"])]
        return sum(len(ids) for ids in tokenize(tokenizer, texts, PASSAGE_MAX_LEN))

    longest = max(range(len(batches)), key=lambda number: tokens(batches[number]))
    return [batches[longest], *batches[:longest], *batches[longest + 1 :]]


def write(folder: Path, batches: Sequence[Sequence[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """Writes FOLDER/rows, tokens, and rows.jsonl in the order of our plan; token counts of each batch."""
    folder.mkdir(parents=True)
    size = len(batches[0])
    plan = BatchPlan(num_rows=size * len(batches), global_batch_size=size, seed=SEED)
    placed: list[dict[str, Any]] = [{}] * plan.num_rows
    for number, batch in enumerate(batches):
        for row, own in zip(plan.rows(number).tolist(), batch, strict=True):
            placed[row] = own
    writer = StoreWriter(folder / "rows", ROWS, plan.num_rows)
    for own in placed:
        writer.add(own)
    writer.finish()
    write_tokens(
        pa.Table.from_pylist(placed, schema=ROWS),
        folder,
        "0",
        model=ModelConfig(name_or_path="unread"),
        tokenize=lambda texts, length: tokenize(tokenizer, texts, length),
        query_max_len=QUERY_MAX_LEN,
        passage_max_len=PASSAGE_MAX_LEN,
    )
    keys = ("query", "pos", "neg")
    write_lines(folder / "rows.jsonl", [{key: row[key] for key in keys} for batch in batches for row in batch])

    def counts(texts: list[str], length: int) -> list[int]:
        return [len(ids) for ids in tokenize(tokenizer, texts, length)]

    passages = [[text for row in batch for text in (*row["pos"], *row["neg"])] for batch in batches]
    return Lengths(
        [counts([row["query"] for row in batch], QUERY_MAX_LEN) for batch in batches],
        [counts(texts, PASSAGE_MAX_LEN) for texts in passages],
    )


def experiment(model: Path, *, queries: int, steps: int, learning_rate: float, bf16: bool) -> Experiment:
    """What we train with; dropout is as the model's folder says."""
    return Experiment(
        output_dir="unused",
        seed=SEED,
        model=ModelConfig(name_or_path=str(model), pooling="mean"),
        data=DataConfig(train_group_size=GROUP, query_max_len=QUERY_MAX_LEN, passage_max_len=PASSAGE_MAX_LEN),
        train=TrainConfig(
            temperature=TEMPERATURE,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=queries,
            max_steps=steps,
            bf16=bf16,
            packed=True,
        ),
    )


def worker(folder: Path) -> Worker:
    """The one that trains on what `write` wrote."""
    return Worker(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        rows=folder / "rows",
        tokens=folder,
        parts=("0",),
        train_folder=folder / "unused",
        model_folder=folder / "unused",
        probe_texts=(),
    )
