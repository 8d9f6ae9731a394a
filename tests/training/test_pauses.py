"""Between two steps: what is evaluated, saved and told, in which order, and when training ends."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayembed.config import Experiment
from rayembed.tracking.metrics import MetricsLog
from rayembed.training.leaving import LeftError
from rayembed.training.pauses import Course, Pauses, no_checkpoint

NOTHING, LEAVE, ASK = [False] * 3, [True, False, False], [False, False, True]


class Run:
    """Pauses of one worker whose evaluations are told beforehand; `events` has what it did."""

    def __init__(self, figures: Sequence[float], *, total: int = 6, notice: bool = False, **train: Any) -> None:  # noqa: ANN401
        self._settings = {"eval_steps": 2, "save_steps": 100, **train}
        self._figures, self._total, self._notice = iter(figures), total, notice
        self.events: list[tuple[Any, ...]] = []
        self.states: list[dict[str, Any]] = []
        self.name = "dev-1"
        self.base: Path | None = None
        self.base_figures: dict[str, float] | None = None

    def pauses(self, found: dict[str, Any] | None = None, log: MetricsLog | None = None) -> Pauses:
        worker: Any = SimpleNamespace(
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            dev=None,
            notice=lambda: self._notice,
            told=lambda figures: self.events.append(("told", figures["step"], figures["ndcg@10"])),
            base=self.base,
            base_figures=self.base_figures,
        )
        experiment: Any = SimpleNamespace(train=made(self._settings))
        engine: Any = None
        pauses = Pauses(
            experiment, worker, engine, self._save, log, found=found or {"step": 0}, total_steps=self._total
        )
        split = SimpleNamespace(name=self.name, words="some", counts={"queries": 1, "passages": 2, "corpus": 3})
        pauses._validation = SimpleNamespace(figures=self._evaluate, split=split)  # type: ignore[assignment]
        pauses.course = Course.resumed((found or {}).get("course"), f"ndcg@10 on {self.name}")
        return pauses

    def _save(self, engine: object, state: dict[str, Any], loss: float, figures: dict[str, float] | None, /) -> None:
        self.events.append(("saved", state["step"], None if figures is None else figures["ndcg@10"]))
        self.states.append(state)

    def _evaluate(self) -> dict[str, float]:
        self.events.append(("evaluated",))
        return {"ndcg@10": next(self._figures), "mrr@10": 0.25}

    def done(self, pauses: Pauses, first: int = 0, flags: Sequence[bool] = NOTHING) -> int:
        """Goes through the steps to the end, and says after how many it was there."""
        if pauses.at(first):
            return first
        for step in range(first + 1, self._total + 1):
            pauses.saves.add(1.0)
            if pauses.at(step, flags):
                return step
        return self._total

    def without_evaluated(self) -> Iterator[tuple[Any, ...]]:
        return (event for event in self.events if event != ("evaluated",))


def made(train: dict[str, Any]) -> Any:  # noqa: ANN401 - the section
    model: Any = {"name_or_path": "base"}
    data: Any = {"evaluation": "beir"}
    given: Any = train
    return Experiment(output_dir="run", model=model, data=data, train=given).train


def test_the_base_model_every_few_steps_and_the_last_one_are_evaluated() -> None:
    run = Run([0.1, 0.2, 0.3, 0.4], total=5)
    assert run.done(run.pauses()) == 5
    assert [*run.without_evaluated()] == [("told", 0, 0.1), ("told", 2, 0.2), ("told", 4, 0.3), ("told", 5, 0.4)]


def test_the_base_model_is_evaluated_once_for_all_trainings_that_begin_with_it(tmp_path: Path) -> None:
    first = Run([0.1, 0.2, 0.3, 0.4])
    first.base = tmp_path / "base.json"
    with MetricsLog(tmp_path / "first", last_step=0) as log:
        first.done(first.pauses(log=log))
    assert first.events.count(("evaluated",)) == 4
    assert json.loads(first.base.read_text()) == {"ndcg@10": 0.1, "mrr@10": 0.25}
    second = Run([0.2, 0.3, 0.4])
    second.base, second.base_figures = first.base, json.loads(first.base.read_text())
    with MetricsLog(tmp_path / "second", last_step=0) as log:
        second.done(second.pauses(log=log))
    assert second.events.count(("evaluated",)) == 3
    assert [*second.without_evaluated()] == [*first.without_evaluated()]
    lines = [(tmp_path / name / "evaluations.jsonl").read_text().splitlines() for name in ("first", "second")]
    told = [[json.loads(line)["eval"] for line in own] for own in lines]
    assert told[0] == told[1]
    assert len(told[0]) == 4


def test_without_evaluations_checkpoints_are_as_they_were() -> None:
    run = Run([], save_steps=2, eval_steps=None)
    pauses = run.pauses()
    pauses._validation = None
    assert run.done(pauses) == 6
    assert run.events == [("saved", 2, None), ("saved", 4, None)]
    assert run.states == [{"step": 2}, {"step": 4}]


@pytest.mark.parametrize("by", ["load_best_model_at_end", "save_best"])
def test_the_best_so_far_has_a_checkpoint_but_not_the_base_model_nor_the_last_step(by: str) -> None:
    run = Run([0.5, 0.6, 0.6, 0.7], **{by: True})
    pauses = run.pauses()
    run.done(pauses)
    assert [*run.without_evaluated()] == [("told", 0, 0.5), ("saved", 2, 0.6), ("told", 4, 0.6), ("told", 6, 0.7)]
    assert pauses.written_step is None, "the last step is the best"


@pytest.mark.parametrize(
    ("figures", "written"), [([0.5, 0.6, 0.6, 0.4], 2), ([0.5, 0.4, 0.5, 0.1], 0), ([0.1, 0.2, 0.3, 0.9], None)]
)
def test_what_is_written_is_the_first_of_the_best(figures: list[float], written: int | None) -> None:
    for load in (True, False):
        run = Run(figures, load_best_model_at_end=load)
        pauses = run.pauses()
        run.done(pauses)
        assert pauses.written_step == (written if load else None)


def test_a_step_has_one_checkpoint_with_its_figures_if_it_has_some() -> None:
    run = Run([0.5, 0.6, 0.4, 0.3, 0.2], total=8, save_steps=3, eval_steps=2, save_best=True)
    run.done(run.pauses())
    assert [event for event in run.events if event[0] == "saved"] == [
        ("saved", 2, 0.6),
        ("saved", 3, None),
        ("saved", 6, 0.3),
    ]


def test_training_ends_when_patience_does_and_nothing_is_saved_there(tmp_path: Path) -> None:
    run = Run([0.5, 0.6, 0.6, 0.59], total=20, save_steps=6, early_stopping_patience=2, load_best_model_at_end=True)
    with MetricsLog(tmp_path, last_step=0) as log:
        pauses = run.pauses(log=log)
        assert run.done(pauses) == 6
    assert run.events[-1] == ("told", 6, 0.59)
    assert ("saved", 6, 0.59) not in run.events
    assert pauses.written_step == 2
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[1]["eval"] == {"ndcg@10": 0.6, "mrr@10": 0.25}
    assert {key: lines[0][key] for key in ("metric", "of", "queries", "passages", "corpus")} == {
        **{"metric": "ndcg@10", "of": "some"},
        **{"queries": 1, "passages": 2, "corpus": 3},
    }
    assert [line.get("stopped_early") for line in lines] == [None, None, None, True]
    assert [line.get("model_step") for line in lines] == [None, None, None, 2]


def test_the_end_of_training_is_no_early_stop(tmp_path: Path) -> None:
    run = Run([0.5, 0.4, 0.3], total=4, early_stopping_patience=2)
    with MetricsLog(tmp_path, last_step=0) as log:
        run.done(run.pauses(log=log))
    last = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert "stopped_early" not in last
    assert last["model_step"] == 4


def test_a_worker_that_is_to_leave_saves_first_and_the_evaluation_is_made_after_the_restart() -> None:
    run = Run([0.5, 0.9, 0.8], load_best_model_at_end=True, total=4)
    pauses = run.pauses()
    pauses.at(0)
    pauses.saves.add(1.0)
    pauses.at(1, NOTHING)
    pauses.saves.add(1.0)
    with pytest.raises(LeftError, match="the checkpoint of step 2"):
        pauses.at(2, LEAVE)
    assert [*run.without_evaluated()] == [("told", 0, 0.5), ("saved", 2, None)]
    resumed = run.pauses(found=run.states[-1])
    assert run.done(resumed, 2) == 4
    assert [*run.without_evaluated()][2:] == [("saved", 2, 0.9), ("told", 4, 0.8)]
    assert resumed.written_step == 2


def test_before_a_machine_is_taken_away_the_checkpoint_comes_first() -> None:
    run = Run([0.5, 0.9, 0.8], notice=True, total=4)
    pauses = run.pauses()
    pauses.at(0)
    for step in (1, 2):
        pauses.saves.add(1.0)
        pauses.at(step, NOTHING if step == 1 else ASK)
    assert run.events[2:] == [("saved", 2, None), ("evaluated",), ("told", 2, 0.9)]


@pytest.mark.parametrize("resume", [2, 4])
def test_a_run_that_goes_on_knows_what_was_evaluated(resume: int) -> None:
    settings: dict[str, Any] = {"load_best_model_at_end": True, "early_stopping_patience": 3, "save_steps": 2}
    figures = [0.5, 0.7, 0.6, 0.65, 0.1, 0.9]
    whole = Run(figures, total=20, **settings)
    assert whole.done(whole.pauses()) == 8
    (state,) = (state for state in whole.states if state["step"] == resume)
    later = Run(figures[resume // 2 + 1 :], total=20, **settings)
    pauses = later.pauses(found=state)
    assert later.done(pauses, resume) == 8
    assert pauses.written_step == 2
    after = [event for event in whole.without_evaluated() if event[1] > resume]
    assert [*later.without_evaluated()] == after


def test_figures_of_other_texts_are_not_compared() -> None:
    run = Run([0.5, 0.9, 0.3, 0.4], save_best=True, total=4)
    first = run.pauses()
    first.at(0)
    first.saves.add(1.0)
    first.at(2, NOTHING)
    run.name = "dev-2"
    assert run.done(run.pauses(found=run.states[-1]), 2) == 4
    assert [*run.without_evaluated()][2:] == [("saved", 2, 0.3), ("told", 4, 0.4)], "the last step has no checkpoint"


def test_the_time_of_an_evaluation_is_of_no_step() -> None:
    run = Run([0.5, 0.6])
    pauses = run.pauses()
    for step, restarted in ((0, True), (1, False), (2, True)):
        pauses.meter._start = -1e9
        pauses.saves.add(1.0)
        pauses.at(step, NOTHING if step else ())
        assert (pauses.meter._start > 0) is restarted


def test_where_no_checkpoints_are_kept_none_is_given() -> None:
    with pytest.raises(FileNotFoundError, match="step 7"):
        no_checkpoint(7)
