"""What is wrong with a step is named in every one, and told at most every 100 steps."""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rayembed.data.datasets import Dataset
from rayembed.training.alarms import Alarms, Judge, score_spread
from tests.training.made_batches import one_dataset
from tests.training.test_engine import experiment

DATASET = one_dataset(experiment(Path("unused"), 1, 0))


def names(
    alarms: Alarms,
    step: int = 1,
    *,
    spread: float | None = 1.0,
    dataset: Dataset = DATASET,
    **figures: float,
) -> list[str]:
    usual = {"step": step, "loss": 1.0, "grad_norm": 1.0, "negatives_per_query": 7}
    return alarms.raised({**usual, **figures}, spread=spread, dataset=dataset)


def test_a_usual_step_raises_none() -> None:
    alarms = Alarms()
    assert [names(alarms, step, grad_norm=9.9 if step > 20 else 1.0, loss=1e-9) for step in range(1, 25)] == [[]] * 24
    assert names(alarms, 25, spread=None) == []


def test_each_alarm_has_its_name() -> None:
    assert names(Alarms(), loss=0.0) == ["zero_loss"]
    assert names(Alarms(), spread=9e-5) == ["score_collapse"]
    assert names(Alarms(), negatives_per_query=0) == ["no_negatives"]


def test_data_that_are_not_compared_need_no_negatives() -> None:
    settings = experiment(Path("unused"), 1, 0)
    for dataset in (one_dataset(settings, type="sts"), one_dataset(settings, loss="pointwise_bce")):
        assert names(Alarms(), negatives_per_query=0, dataset=dataset) == []


def test_a_gradient_norm_is_compared_with_the_median_of_those_before() -> None:
    early, late = Alarms(), Alarms()
    for step in range(1, 9):
        names(early, step)
    assert names(early, 9, grad_norm=1000.0) == [], "too few to compare with"
    for step in range(1, 11):
        names(late, step, grad_norm=float(step))  # median 5.5
    assert names(late, 11, grad_norm=54.0) == []
    assert names(late, 12, grad_norm=61.0) == ["grad_norm_spike"]  # median 6 of 1 to 10 and 54


def test_an_alarm_is_told_every_100_steps_and_each_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms()
    with caplog.at_level(logging.WARNING, logger="rayembed"):
        for step in range(1, 202):
            assert "zero_loss" in names(alarms, step, loss=0.0, spread=0.0 if step == 50 else None)
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[1].strip() for line in told] == ["step 1", "step 50", "step 101", "step 201"]
    assert "all scores of the batch are alike" in told[1]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_the_spread_is_that_of_the_scores() -> None:
    torch.manual_seed(0)
    queries, passages = (F.normalize(torch.randn(n, 8), dim=-1) for n in (3, 6))
    expected = torch.tensor([[float(q @ p) for p in passages] for q in queries]).std().item()
    judge = Judge(lambda outputs: outputs[0].sum())
    assert judge.spread() is None
    assert judge((queries, passages)).item() == pytest.approx(queries.sum().item())
    assert judge.spread() == pytest.approx(expected)
    assert float(score_spread(({"dense": queries}, {"dense": passages}))) == pytest.approx(expected)
    assert float(score_spread((torch.tensor([1.0, 3.0]),))) == pytest.approx(2**0.5), "of a reranker, the scores"
    one = F.normalize(torch.ones(5, 8), dim=-1)
    assert float(score_spread((one, one))) < 1e-4
    judge((queries[:1], passages[:1]))
    assert judge.spread() is None, "one score has no spread"
