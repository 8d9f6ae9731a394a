"""The rules of FlagEmbedding's same-dataset training set: which files are used, batch and group sizes, prompts.

Which rows share a batch differs on purpose (rayembed/data/mixing.py).
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments
from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderSameDatasetTrainDataset
from pydantic import TypeAdapter

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig
from rayembed.data.datasets import read_datasets
from rayembed.data.mixing import MixedPlan, batch_plan
from rayembed.data.plan import choose_group
from rayembed.data.prepare import prepare
from rayembed.data.prompts import passage_of_row, query_text
from rayembed.data.store import Store

pytestmark = pytest.mark.parity

FILES: dict[str, tuple[int, dict[str, Any]]] = {  # rows, and what is in each of them
    "big": (23, {}),
    "few": (3, {}),
    "one-neg": (17, {"type": "only_1neg"}),
    "classes": (12, {"type": "symmetric_class"}),
    "pairs-no_in_batch_neg": (16, {"type": "symmetric_sts"}),
    "folder/a": (7, {}),
    "folder/b": (3, {}),
    "folder/c": (3, {}),
    "drop/d": (2, {}),
    "plain-no_in_batch_neg/e": (9, {}),
}
SOURCES = ["big.jsonl", "few.jsonl", "one-neg.jsonl", "classes.jsonl", "pairs-no_in_batch_neg.jsonl"]
FOLDERS = ["folder", "drop", "plain-no_in_batch_neg"]
WORKERS, SIZE, GROUP = 2, 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    for name, (number, more) in FILES.items():
        path = base / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [
            {"query": f"{name} {i}", "pos": [f"{name} pos {i}"], "neg": [f"neg {k}" for k in range(3)], **more}
            for i in range(number)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


def theirs(folder: Path) -> AbsEmbedderSameDatasetTrainDataset:
    arguments = AbsEmbedderDataArguments(
        train_data=[str(folder / name) for name in [*SOURCES, *FOLDERS]],
        cache_path=str(folder / "cache"),
        train_group_size=GROUP,
        same_dataset_within_batch=True,
        small_threshold=4,
        drop_threshold=4,
        query_instruction_for_retrieval="find",
        query_instruction_format="{}: {}",
        passage_instruction_for_retrieval="passage",
        passage_instruction_format="{}> {}",
    )
    return AbsEmbedderSameDatasetTrainDataset(
        args=arguments, default_batch_size=SIZE, seed=1, tokenizer=None, process_index=0, num_processes=WORKERS
    )


def ours(folder: Path) -> tuple[Store, MixedPlan, Experiment]:
    run = Experiment(
        output_dir=str(folder / "run"),
        model=ModelConfig(
            name_or_path="none",
            query_instruction_for_retrieval="find",
            query_instruction_format="{}: {}",
            passage_instruction_for_retrieval="passage",
            passage_instruction_format="{}> {}",
        ),
        ray=RayConfig(num_workers=WORKERS),
        train=TypeAdapter(TrainConfig).validate_python({"per_device_train_batch_size": SIZE}),
        data=DataConfig(
            train=[str(folder / name) for name in [*SOURCES, *FOLDERS]],
            train_group_size=GROUP,
            small_threshold=4,
            drop_threshold=4,
        ),
    )
    prepared = prepare(run)
    prepared.report.raise_if_errors()
    assert prepared.rows is not None
    plan = batch_plan(read_datasets(prepared.rows, run), run)
    assert isinstance(plan, MixedPlan)
    return prepared.rows, plan, run


def file_of(query: str) -> str:
    return query.rsplit(" ", 1)[0]


def test_batches_are_of_the_same_files_and_sizes(folder: Path) -> None:
    peer = theirs(folder)
    expected = Counter(
        (frozenset(file_of(query).split("/")[0] for query in peer.dataset[rows.tolist()]["query"]), len(rows), alone)
        for rows, alone in peer.batch_datas
    )
    store, plan, _ = ours(folder)
    found = Counter(
        (
            frozenset(file_of(query).split("/")[0] for query in store.take(rows).column("query").to_pylist()),
            len(rows),
            plan.data.items[plan.dataset(number)].no_in_batch_neg,
        )
        for number in range(plan.batches_per_epoch)
        for rows in [plan.rows(number)]
    )
    assert found == expected
    assert len(expected) == 6
    assert sum(number for (_, _, alone), number in expected.items() if alone) > 0


def test_groups_are_of_the_same_size_and_put_the_same_way(folder: Path) -> None:
    peer = theirs(folder)
    store, plan, run = ours(folder)
    wanted = {}
    for step in range(len(peer.batch_datas)):
        peer.step = step
        queries, passages, _, _ = peer[0]
        size = len(passages) // len(queries)
        for i, query in enumerate(queries):
            group = passages[i * size : (i + 1) * size]
            wanted[query] = (size, group[0], set(group[1:]) <= {group_text(run, query, f"neg {k}") for k in range(3)})
    compared = Counter[str]()
    for number in range(plan.batches_per_epoch):
        item = plan.data.items[plan.dataset(number)]
        for number_of_row, row in zip(
            plan.rows(number).tolist(), store.take(plan.rows(number)).to_pylist(), strict=True
        ):
            query = query_text(run.model, row["query"], row["prompt"])
            if query not in wanted:  # sits out this epoch there
                continue
            put = {"row_type": row["type"], "prompt": row["prompt"]}
            _, negatives = choose_group(1, 0, number_of_row, num_pos=1, num_neg=3, group_size=item.group_size)
            assert wanted[query] == (1 + len(negatives), passage_of_row(run.model, row["pos"][0], **put), True)
            compared[item.name] += 1
    assert len(compared) == 7


def group_text(run: Experiment, query: str, text: str) -> str:
    """How a passage must look beside a query, by the name of its file."""
    return f"find: {text}" if "pairs" in query else f"passage> {text}"
