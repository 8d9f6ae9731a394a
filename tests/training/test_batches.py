"""Workers' batches join to the same global batch on any number of workers, and the thread ahead hides nothing."""

import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rayembed.config.model import ModelConfig
from rayembed.data.plan import BatchPlan, choose_group
from rayembed.data.store import ROWS
from rayembed.data.tokens import TokenStore, write_tokens
from rayembed.models.embedder import TokenBatch
from rayembed.training.batches import Batch, BatchSource

NUM_ROWS, BATCH, GROUP, PAD = 11, 4, 3, 0


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
    return BatchSource(
        tokens=TokenStore(tmp_path, ["0", "1"]),
        plan=BatchPlan(NUM_ROWS, BATCH, seed=3),
        rank=0,
        world_size=1,
        group_size=GROUP,
        distill=True,
        pad_token=PAD,
        padding_side="right",
        pad_to_multiple_of=None,
        sub_batch_size=None,
        pin_memory=False,
    )


def texts(batch: TokenBatch) -> list[list[int]]:
    """Token ids of each text in the order of the texts."""
    rows = [ids[mask.bool()].tolist() for chunk in batch.chunks for ids, mask in zip(*chunk, strict=True)]
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
        assert texts(batch.queries) == [[1000 + 10 * row] * (1 + row % 4) for row in rows]
        assert texts(batch.passages) == expected
        assert batch.teacher is not None
        assert batch.teacher.dtype == torch.float32
        torch.testing.assert_close(batch.teacher, torch.tensor(scores).view(BATCH, GROUP))


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_parts_join_to_the_global_batch(source: BatchSource, world_size: int) -> None:
    for number in (0, 1, 5):
        whole = source.batch(number)
        parts = [replace(source, rank=rank, world_size=world_size).batch(number) for rank in range(world_size)]
        assert [text for part in parts for text in texts(part.queries)] == texts(whole.queries)
        assert [text for part in parts for text in texts(part.passages)] == texts(whole.passages)
        assert whole.teacher is not None
        teachers = [part.teacher for part in parts if part.teacher is not None]
        assert torch.equal(torch.cat(teachers), whole.teacher)


def test_padding_and_chunks_leave_the_texts_as_they_are(source: BatchSource) -> None:
    whole = source.batch(0)
    padded = replace(source, pad_to_multiple_of=8, sub_batch_size=5, padding_side="left").batch(0)
    assert [ids.shape[1] % 8 for ids, _ in padded.passages.chunks] == [0, 0, 0]
    assert [len(ids) for ids, _ in padded.passages.chunks] == [5, 5, 2]
    assert texts(padded.passages) == texts(whole.passages)


def test_without_distillation_there_is_no_teacher(source: BatchSource) -> None:
    assert replace(source, distill=False).batch(0).teacher is None


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def wait_until_none_works() -> None:
    for thread in working():
        thread.join(timeout=5)
    assert not working()


def test_batches_ahead_are_the_same_in_order(source: BatchSource) -> None:
    ahead = [texts(batch.passages) for batch in source.ahead(1, 7)]
    assert ahead == [texts(source.batch(number).passages) for number in range(1, 7)]
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
    assert [len(next(batches).queries.order) for _ in range(2)] == [BATCH, BATCH]
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
    assert texts(moved.passages) == texts(batch.passages)
    assert moved.teacher is not None
    assert batch.teacher is not None
    assert torch.equal(moved.teacher, batch.teacher)
    assert replace(source, distill=False).batch(0).to(torch.device("cpu")).teacher is None
