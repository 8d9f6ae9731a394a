"""Workers' batches join to the same global batch on any number of workers, and the thread ahead hides nothing."""

import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rayembed.config.model import ModelConfig
from rayembed.data.datasets import Dataset, Datasets
from rayembed.data.plan import BatchPlan, choose_group
from rayembed.data.store import ROWS
from rayembed.data.tokens import TokenStore, write_tokens
from rayembed.models.chunks import TokenBatch
from rayembed.models.pairs import PairLayout
from rayembed.training.batches import Batch, BatchSource
from tests.training.made_batches import source_of

NUM_ROWS, BATCH, GROUP, PAD = 11, 4, 3, 0
DATASET = Dataset(
    name="",
    type=None,
    num_rows=NUM_ROWS,
    batch_sizes=((None, BATCH),),
    group_size=GROUP,
    loss="info_nce",
    no_in_batch_neg=False,
    weight=1.0,
)


@pytest.fixture
def source(tmp_path: Path) -> BatchSource:
    """Row r: query 1000 + r, positives 2000 + 10r + k, negatives 3000 + 10r + k, each as often as its length says."""

    def text(start: int, row: int, k: int) -> str:
        return " ".join([str(start + 10 * row + k)] * (1 + (row + k) % 4))

    rows = []
    for row in range(NUM_ROWS):
        numbers: dict[str, Any] = {"pos": range(1 + row % 3), "neg": range(1 + row % 5)}
        texts = {
            "pos": [text(2000, row, k) for k in numbers["pos"]],
            "neg": [text(3000, row, k) for k in numbers["neg"]],
        }
        scores = {
            "pos_scores": [row + 0.1 * k for k in numbers["pos"]],
            "neg_scores": [-row - k for k in numbers["neg"]],
        }
        rows.append({"query_id": str(row), "dataset": "d", "query": text(1000, row, 0), **texts, **scores})
    for part, few in (("0", rows[:5]), ("1", rows[5:])):
        write_tokens(
            pa.Table.from_pylist(few, schema=ROWS),
            tmp_path,
            part,
            model=ModelConfig(name_or_path="none"),
            tokenize=lambda texts, length: [[int(word) for word in text.split()][:length] for text in texts],
            query_max_len=8,
            passage_max_len=8,
        )
    datasets = Datasets((DATASET,), np.zeros(NUM_ROWS, np.int32), np.full(NUM_ROWS, -1, np.int32))
    plan = BatchPlan(NUM_ROWS, BATCH, seed=3)
    return source_of(TokenStore(tmp_path, ["0", "1"]), datasets, plan, distill=True, pad_token=PAD)


@pytest.mark.parametrize("packed", [False, True])
def test_copies_of_the_longest_text(source: BatchSource, packed: bool) -> None:
    source = replace(source, packed=packed)
    rows = [source.tokens.row(row) for row in range(NUM_ROWS)]
    longest = max(len(text) for row in rows for text in (row.query, *row.pos, *row.neg))
    copies = source.copies_of_longest(3)
    (chunk,) = copies.chunks
    assert (chunk.num_texts, chunk.num_tokens) == (3, 3 * longest)
    layout = PairLayout(((1,), (2, 3), (4,)), (0, 0, 0, 1, 1), query_max_len=2, passage_max_len=3, max_len=8)
    (pairs,) = replace(source, layout=layout).copies_of_longest(2).chunks
    every = [
        layout.pack(np.repeat(row.query, 2), text) for row in rows for text in (*row.pos, *row.neg)
    ]  # queries of the most tokens that are kept
    assert pairs.types is not None
    ids, types = pairs.ids.view(2, -1).tolist(), pairs.types.view(2, -1).tolist()
    assert ids[0] == ids[1]
    assert types[0] == types[1]
    assert (ids[0], types[0]) in every
    assert len(ids[0]) == max(len(own) for own, _ in every)


def texts(batch: TokenBatch) -> list[list[int]]:
    """Token ids of each text in the order of the texts."""
    padded = [row for chunk in batch.chunks for row in zip(chunk.ids, chunk.mask, strict=True)]
    rows = [ids[mask.bool()].tolist() for ids, mask in padded]
    return [rows[i] for i in batch.order.tolist()]


def test_a_batch_holds_what_plan_and_choice_say(source: BatchSource) -> None:
    for number in range(6):
        batch = source.batch(number)
        expected: list[list[int]] = []
        scores: list[float] = []
        rows = source.plan.rows(number).tolist()
        for row in rows:
            positive, negatives = choose_group(
                3, number // 2, row, num_pos=1 + row % 3, num_neg=1 + row % 5, group_size=GROUP
            )
            expected.append([2000 + 10 * row + positive] * (1 + (row + positive) % 4))
            expected += [[3000 + 10 * row + k] * (1 + (row + k) % 4) for k in negatives.tolist()]
            scores += [row + 0.1 * positive, *(-row - k for k in negatives.tolist())]
        assert texts(batch.inputs[0]) == [[1000 + 10 * row] * (1 + row % 4) for row in rows]
        assert texts(batch.inputs[1]) == expected
        assert batch.teacher is not None
        assert batch.teacher.dtype == torch.float32
        torch.testing.assert_close(batch.teacher, torch.tensor(scores).view(BATCH, GROUP))


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_parts_join_to_the_global_batch(source: BatchSource, world_size: int) -> None:
    for number in (0, 1, 5):
        whole = source.batch(number)
        parts = [replace(source, rank=rank, world_size=world_size).batch(number) for rank in range(world_size)]
        assert [text for part in parts for text in texts(part.inputs[0])] == texts(whole.inputs[0])
        assert [text for part in parts for text in texts(part.inputs[1])] == texts(whole.inputs[1])
        assert whole.teacher is not None
        teachers = [part.teacher for part in parts if part.teacher is not None]
        assert torch.equal(torch.cat(teachers), whole.teacher)


def test_padding_and_chunks_leave_the_texts_as_they_are(source: BatchSource) -> None:
    whole = source.batch(0)
    padded = replace(source, pad_to_multiple_of=8, sub_batch_size=5, padding_side="left").batch(0)
    assert [chunk.ids.shape[1] % 8 for chunk in padded.inputs[1].chunks] == [0, 0, 0]
    assert [len(chunk.ids) for chunk in padded.inputs[1].chunks] == [5, 5, 2]
    assert texts(padded.inputs[1]) == texts(whole.inputs[1])


def test_without_distillation_there_is_no_teacher(source: BatchSource) -> None:
    assert replace(source, distill=False).batch(0).teacher is None


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def wait_until_none_works() -> None:
    for thread in working():
        thread.join(timeout=5)
    assert not working()


def test_batches_ahead_are_the_same_in_order(source: BatchSource) -> None:
    ahead = [texts(batch.inputs[1]) for batch in source.ahead(1, 7)]
    assert ahead == [texts(source.batch(number).inputs[1]) for number in range(1, 7)]
    assert list(source.ahead(3, 3)) == []
    wait_until_none_works()


class Faulty(BatchSource):
    """Fails at batch 2 and remembers which batches it was asked for."""

    def batch(self, number: int) -> Batch:
        ASKED.append(number)
        if number == 2:
            raise ValueError("batch 2 is bad")
        return super().batch(number)


ASKED: list[int] = []


@pytest.fixture
def faulty(source: BatchSource) -> BatchSource:
    ASKED.clear()
    return Faulty(**vars(source))


def test_an_error_of_the_thread_reaches_the_training_step_in_its_turn(faulty: BatchSource) -> None:
    batches = faulty.ahead(0, 9)
    assert [next(batches).num_queries for _ in range(2)] == [BATCH, BATCH]
    with pytest.raises(ValueError, match="batch 2 is bad"):
        next(batches)
    wait_until_none_works()
    assert ASKED == [0, 1, 2], "nothing is built after the error"


def test_the_thread_waits_when_it_is_ahead_enough_and_ends_when_training_does(faulty: BatchSource) -> None:
    batches = faulty.ahead(3, 1000, depth=2)
    next(batches)
    time.sleep(0.3)
    assert ASKED in ([3, 4, 5], [3, 4, 5, 6]), "two wait, and one more is in the thread's hands"
    assert isinstance(batches, Generator)
    batches.close()
    wait_until_none_works()
    assert len(ASKED) < 8


def test_a_batch_goes_to_a_device_whole(source: BatchSource) -> None:
    batch = source.batch(0)
    moved = batch.to(torch.device("cpu"))
    assert texts(moved.inputs[1]) == texts(batch.inputs[1])
    assert moved.teacher is not None
    assert batch.teacher is not None
    assert torch.equal(moved.teacher, batch.teacher)
    assert replace(source, distill=False).batch(0).to(torch.device("cpu")).teacher is None


def test_equal_texts_have_equal_keys_and_no_others(source: BatchSource) -> None:
    for number in range(6):
        batch = source.batch(number)
        rows = source.plan.rows(number).tolist()
        texts_of = [texts(part) for part in batch.inputs]
        keys = [batch.keys.queries.tolist(), batch.keys.passages.tolist()]
        key_of = {
            str(text): key
            for own, found in zip(texts_of, keys, strict=True)
            for text, key in zip(own, found, strict=True)
        }
        assert len({*key_of.values()}) == len(key_of), "no two texts have one key"
        assert 0 not in key_of.values()
        for row, known in zip(rows, batch.keys.positives.tolist(), strict=True):
            positives = [[2000 + 10 * row + k] * (1 + (row + k) % 4) for k in range(1 + row % 3)]
            assert len([key for key in known if key]) == len(positives)
            drawn = [str(text) for text in positives if str(text) in key_of]
            assert {key_of[text] for text in drawn} <= {*known}
            assert drawn


def test_pairs_are_each_query_with_each_of_its_passages(source: BatchSource) -> None:
    layout = PairLayout(((1,), (2, 3), (4,)), (0, 0, 0, 1, 1), query_max_len=2, passage_max_len=3, max_len=8)
    for number in range(3):
        (pairs,) = replace(source, layout=layout, padding_side="left").batch(number).inputs
        queries, passages = (texts(part) for part in source.batch(number).inputs)
        expected = [
            [1, *queries[i // GROUP][:2], 2, 3, *passage[: min(3, 8 - 4 - len(queries[i // GROUP][:2]))], 4]
            for i, passage in enumerate(passages)
        ]
        assert texts(pairs) == expected
        types = [
            row
            for chunk in pairs.chunks
            if chunk.types is not None
            for row in zip(chunk.types, chunk.mask, strict=True)
        ]
        found = [types[i][0][types[i][1].bool()].tolist() for i in pairs.order.tolist()]
        assert [sum(row) for row in found] == [len(text) - text.index(3) - 1 for text in expected]
