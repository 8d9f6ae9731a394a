"""Trials on disk, the course of a sweep and its table, without Ray: what a killed sweep goes on from."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.train.v2._internal import constants

from rayembed.config import Experiment
from rayembed.config.loading import load
from rayembed.config.ray import RayConfig
from rayembed.config.tune import TuneConfig
from rayembed.jobs.tune_prepare import Prepared
from rayembed.jobs.tune_ray import EVALUATION, OF, Chosen, Halving, Reports, _name_this_ray, trials_at_once
from rayembed.jobs.tune_results import NothingFoundError, best_of, ranked, table_in_words, write_results
from rayembed.jobs.tune_sweep import Course, number_of_trials
from rayembed.jobs.tune_trials import (
    Failure,
    Result,
    Trial,
    begin,
    end,
    evaluations,
    known_trials,
    name_of,
    note_failure,
    read_trial,
    trial_folder,
)

SPACE: dict[str, Any] = {"train.temperature": {"choice": [0.02, 0.05, 0.1]}, "seed": {"choice": [1, 2]}}
METRIC = "ndcg@10"


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return made(tmp_path, space=SPACE, num_samples=4)


def made(folder: Path, **tune: Any) -> Experiment:  # noqa: ANN401 - of section tune
    data: Any = {"train": ["rows.jsonl"], "evaluation": "beir"}
    sections: Any = {"model": {"name_or_path": "some/model"}, "train": {"temperature": 0.05}, "tune": tune}
    return Experiment(output_dir=str(folder / "run"), data=data, **sections)


def write_evaluations(folder: Path, figures: dict[int, float], *, finished: bool) -> None:
    """What the job train leaves."""
    train = folder / ("train" if finished else "train.partial")
    train.mkdir(parents=True)
    lines = [json.dumps({"step": step, "eval": {METRIC: figure, "mrr@10": 0}}) for step, figure in figures.items()]
    (train / "evaluations.jsonl").write_text("".join(line + "\n" for line in lines))


def ended(number: int, values: dict[str, Any], **changed: Any) -> Trial:  # noqa: ANN401 - of a result
    found = {"status": "done", "seconds": 61.0, "evaluations": [(0, 0.5), (4, 0.6), (8, 0.6)], **changed}
    baseline = found.pop("baseline", False)
    return Trial(number, values, baseline, Result(**found))


def test_a_trial_is_called_by_its_values_whatever_their_order() -> None:
    assert name_of({"a": 1, "b": 0.5}) == name_of({"b": 0.5, "a": 1})
    assert len({name_of(point) for point in ({}, {"a": 1}, {"a": 2}, {"a": None}, {"b": 1})}) == 5


@pytest.mark.parametrize(
    ("finished", "lost", "told", "status", "again"),
    [
        (True, False, None, "done", None),
        (False, False, None, "stopped early", None),
        (False, False, Failure("the loss is nan", again=False), "failed", False),
        (False, True, Failure("no memory", again=True), "failed", True),
        (False, True, None, "failed", True),
    ],
)
def test_how_a_trial_ended_is_read_from_its_folder(
    finished: bool, lost: bool, told: Failure | None, status: str, again: bool | None, tmp_path: Path
) -> None:
    trial = Trial(3, {"seed": 1})
    begin(tmp_path, trial)
    folder = trial_folder(tmp_path, trial.name)
    write_evaluations(folder, {0: 0.9, 4: 0.25, 8: 0.75, 12: 0.5}, finished=finished)
    if told is not None:
        note_failure(folder, told)
    assert known_trials(tmp_path) == [trial]
    result = end(tmp_path, trial, metric=METRIC, seconds=2.04, lost=lost).result
    assert result is not None
    assert (result.status, result.seconds) == (status, 2.0)
    assert result.evaluations == [(0, 0.9), (4, 0.25), (8, 0.75), (12, 0.5)]
    assert result.best == (8, 0.75)  # the model before training is no trial's
    assert (result.failure and result.failure.again) == again
    assert read_trial(folder).result == result
    begin(tmp_path, trial)
    assert read_trial(folder).result is None
    write_evaluations(tmp_path / "other", {}, finished=True)
    assert end(tmp_path, trial, metric=METRIC, seconds=0).result.status == status.replace("failed", "stopped early")  # type: ignore[union-attr]


def test_half_a_line_of_a_killed_training_is_no_evaluation_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    write_evaluations(tmp_path, {4: 0.25, 8: 0.5}, finished=False)
    with (tmp_path / "train.partial" / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "eval": {METRIC: 0.75}}) + "\n" + '{"step": 12, "ev')
    assert evaluations(tmp_path, METRIC) == [(4, 0.25), (8, 0.75)]
    assert evaluations(tmp_path / "nothing", METRIC) == []


def test_of_equal_figures_the_earliest_is_the_best_and_without_training_there_is_none() -> None:
    assert ended(0, {}).result.best == (4, 0.6)  # type: ignore[union-attr]
    assert ended(0, {}, evaluations=[(0, 0.9)]).result.best is None  # type: ignore[union-attr]


class FakePreparation:
    """In place of prepare_trial: what was asked for, and what cannot start."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.errors: dict[int, Exception] = {}

    def __call__(self, experiment: Experiment, folder: Path, trial: Trial) -> Prepared:
        self.asked.append(trial.values)
        if trial.number in self.errors:
            raise self.errors[trial.number]
        return Prepared(trial, folder / "rows", eval_steps=4, steps=10)


@pytest.fixture
def preparation(monkeypatch: pytest.MonkeyPatch) -> FakePreparation:
    fake = FakePreparation()
    monkeypatch.setattr("rayembed.jobs.tune_sweep.prepare_trial", fake)
    return fake


def run_all(course: Course, folder: Path, *, at_most: int = 99, finished: bool = True) -> list[Trial]:
    """Chooses and ends one trial after the other."""
    found = []
    while len(found) < at_most and (chosen := course.choose()) is not None:
        own = trial_folder(folder, chosen.trial.name)
        if not (own / "train").exists():
            write_evaluations(own, {0: 0.5, 4: chosen.trial.number / 10}, finished=finished)
        course.ended(chosen.trial, 1.0, False)
        found.append(chosen.trial)
    return found


def test_the_experiment_as_it_is_comes_first_and_then_as_many_as_are_asked_for(
    experiment: Experiment, preparation: FakePreparation
) -> None:
    folder = Path(experiment.output_dir) / "tune"
    course = Course(experiment, folder)
    assert not course.is_done()
    run_all(course, folder)
    assert preparation.asked[0] == {"train.temperature": 0.05, "seed": 42}
    assert [trial.baseline for trial in course.trials] == [True, False, False, False]
    assert [trial.number for trial in course.trials] == [0, 1, 2, 3]
    assert course.is_done()
    assert Course(experiment, folder).is_done()


def test_a_sweep_goes_on_with_what_was_not_finished_and_more_samples_add_some(
    experiment: Experiment, preparation: FakePreparation
) -> None:
    folder = Path(experiment.output_dir) / "tune"
    course = Course(experiment, folder)
    run_all(course, folder, at_most=2)
    left = course.choose()
    assert left is not None
    again = Course(experiment, folder)  # the process was killed while that one ran
    assert not again.is_done()
    assert [trial.values for trial in run_all(again, folder)] == [left.trial.values, preparation.asked[-1]]
    assert [trial.number for trial in again.trials] == [0, 1, 2, 3]
    unbroken = Course(made(Path(experiment.output_dir).parent / "other", space=SPACE, num_samples=4), folder / "other")
    run_all(unbroken, folder / "other")
    assert [trial.values for trial in unbroken.trials] == [trial.values for trial in again.trials]
    assert experiment.tune is not None
    more = replace(experiment, tune=replace(experiment.tune, num_samples=6))
    assert [trial.number for trial in run_all(Course(more, folder), folder)] == [4, 5]
    assert len({json.dumps(values) for values in preparation.asked}) == 6


def test_a_lost_trial_is_tried_again_and_one_that_cannot_be_is_not(
    experiment: Experiment, preparation: FakePreparation
) -> None:
    folder = Path(experiment.output_dir) / "tune"
    preparation.errors = {1: ValueError("train.bf16 is refused"), 2: RuntimeError("a worker was killed")}
    course = Course(experiment, folder)
    assert [trial.number for trial in run_all(course, folder)] == [0, 3]
    found = {trial.number: trial.result for trial in course.trials}
    assert [found[number].status for number in range(4)] == ["done", "failed", "failed", "done"]  # type: ignore[union-attr]
    assert found[1].failure == Failure("train.bf16 is refused", again=False)  # type: ignore[union-attr]
    preparation.errors = {}
    assert [trial.number for trial in run_all(Course(experiment, folder), folder)] == [2]


def test_models_of_finished_trials_are_removed_unless_they_are_to_be_kept(
    tmp_path: Path, preparation: FakePreparation
) -> None:
    for keep in (False, True):
        folder = tmp_path / str(keep)
        course = Course(made(tmp_path, space=SPACE, num_samples=1, keep_models=keep), folder)
        chosen = course.choose()
        assert chosen is not None
        own = trial_folder(folder, chosen.trial.name)
        write_evaluations(own, {4: 0.5}, finished=True)
        for name in ("model", "train/checkpoints"):
            (own / name).mkdir()
        course.ended(chosen.trial, 1.0, False)
        assert [(own / name).exists() for name in ("model", "train/checkpoints")] == [keep, keep]
        assert (own / "train" / "evaluations.jsonl").exists()


def test_a_grid_has_as_many_trials_as_points_and_its_own_baseline_once(tmp_path: Path) -> None:
    space = {"train.temperature": {"choice": [0.02, 0.05]}, "seed": {"choice": [1, 2]}}
    assert number_of_trials(made(tmp_path, space=space, search="grid")) == 5
    assert number_of_trials(made(tmp_path, space=space, search="grid", baseline=False)) == 4
    assert number_of_trials(made(tmp_path, space={**space, "seed": {"choice": [1, 42]}}, search="grid")) == 4
    assert number_of_trials(made(tmp_path, space=space, search="grid", num_samples=3)) == 3
    assert number_of_trials(made(tmp_path, space=space)) == 8


def sweep_of(experiment: Experiment) -> list[Trial]:
    return [
        ended(0, {"train.temperature": 0.05, "seed": 42}, baseline=True, evaluations=[(0, 0.5), (4, 0.625)]),
        ended(1, {"train.temperature": 0.02, "seed": 1}, evaluations=[(0, 0.5), (4, 0.75), (8, 0.7)]),
        ended(2, {"train.temperature": 0.1, "seed": 1}, evaluations=[(0, 0.5), (4, 0.4)], status="stopped early"),
        ended(
            3,
            {"train.temperature": 0.02, "seed": 2},
            evaluations=[(4, 0.9)],
            status="failed",
            failure=Failure("the loss of step 6 is not finite\nmore", again=False),
        ),
        Trial(4, {"train.temperature": 0.1, "seed": 2}),
    ]


def test_the_table_has_a_row_a_trial_that_ended_with_every_key(experiment: Experiment, tmp_path: Path) -> None:
    write_results(experiment, tmp_path, sweep_of(experiment))
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == {
        "number": 1,
        "name": name_of({"train.temperature": 0.02, "seed": 1}),
        "train.temperature": 0.02,
        "seed": 1,
        METRIC: 0.75,
        "step": 4,
        "steps": 8,
        "seconds": 61.0,
        "status": "done",
        "baseline": False,
        "error": "",
    }
    assert (rows[3]["status"], rows[3]["error"]) == ("failed", "the loss of step 6 is not finite\nmore")
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert (told["metric"], told["keys"], told["base"]) == (METRIC, ["train.temperature", "seed"], 0.5)
    assert told["trials"][1]["evaluations"] == [[0, 0.5], [4, 0.75], [8, 0.7]]


def test_values_without_a_common_type_are_written_as_json(tmp_path: Path) -> None:
    space = {"train.mrl_dims": {"choice": [[], [4]]}, "train.deepspeed": {"choice": [None, "a.json", {"x": 1}]}}
    points = [{"train.mrl_dims": [4], "train.deepspeed": "a.json"}, {"train.mrl_dims": [], "train.deepspeed": {"x": 1}}]
    write_results(made(tmp_path, space=space), tmp_path, [ended(i, point) for i, point in enumerate(points)])
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["train.deepspeed"] for row in rows] == ['"a.json"', '{"x": 1}']
    assert [row["train.mrl_dims"] for row in rows] == [[4], []]


def test_the_best_is_a_ready_experiment_file_in_a_folder_of_its_own(experiment: Experiment, tmp_path: Path) -> None:
    write_results(experiment, tmp_path, sweep_of(experiment))
    best = load(str(tmp_path / "best.yaml"))
    assert best.train is not None
    assert (best.train.temperature, best.seed, best.tune) == (0.02, 1, None)
    assert best.output_dir == f"{experiment.output_dir}-best"
    assert best.cache_dir == experiment.cache()
    assert best.train.eval_steps is None  # what a trial has of its own is no part of it
    assert "Trial 1 of" in (tmp_path / "best.yaml").read_text().splitlines()[0]


def test_the_order_is_by_figure_then_by_number_and_a_failed_trial_is_never_the_best(experiment: Experiment) -> None:
    trials = sweep_of(experiment)
    assert [trial.number for trial in ranked(trials)] == [3, 1, 0, 2]
    assert best_of(trials).number == 1
    equal = replace(trials[1], number=9)
    assert best_of([equal, *trials]).number == 1
    with pytest.raises(NothingFoundError, match=r"none of 1 trial has a figure; trial 3 says: the loss of step 6"):
        best_of([trials[3]])


def test_the_table_in_words_has_the_base_model_where_it_belongs(experiment: Experiment) -> None:
    lines = table_in_words(experiment, sweep_of(experiment))
    assert [line.split()[0] for line in lines] == ["trial", "3", "1", "0", "base", "2"]
    assert lines[2].split() == ["1", "0.02", "1", "0.7500", "4", "8", "1", "min", "01", "s"]
    assert lines[3].endswith("the experiment as it is")
    assert lines[5].endswith("stopped early")
    assert "failed; the loss of step 6 is not finite" in lines[1]
    assert lines[2].index("0.7500") == lines[3].index("0.6250") == lines[4].index("0.5000")


def asked(halving: Halving, name: str, number: int, figure: float, *, of: int = 9, spared: bool = False) -> str:
    trial: Any = SimpleNamespace(trial_id=name, config={"to_the_end": spared})
    if name not in halving._trial_info:
        halving.on_trial_add(None, trial)  # type: ignore[arg-type]
    return halving.on_trial_result(None, trial, {EVALUATION: number, OF: of, METRIC: figure})


def test_asha_compares_with_trials_of_earlier_calls() -> None:
    config = TuneConfig(space=SPACE, scheduler="asha", reduction_factor=2)
    before = [ended(i, {"seed": i}, evaluations=[(0, 0.99), (4, figure)]) for i, figure in enumerate((0.6, 0.8))]
    for known, decision in (([], "CONTINUE"), (before, "STOP")):
        assert asked(Halving(config, known), "new", 1, 0.65) == decision
    assert asked(Halving(config, before), "new", 1, 0.75) == "CONTINUE"
    patient = TuneConfig(space=SPACE, scheduler="asha", reduction_factor=2, grace_evaluations=2)
    assert asked(Halving(patient, before), "new", 1, 0.65) == "CONTINUE"


def test_asha_stops_neither_the_baseline_nor_a_trial_at_its_end() -> None:
    config = TuneConfig(space=SPACE, scheduler="asha", reduction_factor=2)
    halving = Halving(config, [ended(0, {}, evaluations=[(4, 0.9), (8, 0.9), (12, 0.9), (16, 0.9)])])
    assert asked(halving, "as it is", 1, 0.1, spared=True) == "CONTINUE"
    assert asked(halving, "bad", 1, 0.1) == "STOP"
    late = Halving(config, [ended(0, {}, evaluations=[(4, 0.9), (8, 0.9), (12, 0.9), (16, 0.9)])])
    assert asked(late, "bad", 4, 0.1, of=4) == "CONTINUE"
    assert asked(late, "worse", 4, 0.05, of=5) == "STOP"


@pytest.mark.parametrize(
    ("nodes", "workers", "config", "expected"),
    [
        ([{"CPU": 2}], {"num_workers": 1}, {}, 2),
        ([{"CPU": 2}], {"num_workers": 2}, {}, 1),
        ([{"CPU": 2}], {"num_workers": 3}, {}, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"num_workers": 1, "cpus_per_worker": 2}, {}, 2),  # a worker is on one node
        ([{"CPU": 64, "GPU": 8}] * 2, {"num_workers": 4, "use_gpu": True}, {}, 4),
        ([{"CPU": 64, "GPU": 8}] * 2, {"num_workers": 4, "use_gpu": True}, {"max_concurrent": 3}, 3),
        ([{"CPU": 8}], {"num_workers": [1, 4], "max_failures": 1}, {}, 2),
    ],
)
def test_trials_at_a_time_are_those_that_have_room_with_all_their_workers(
    nodes: list[dict[str, float]],
    workers: dict[str, Any],
    config: dict[str, Any],
    expected: int,
) -> None:
    assert trials_at_once(TuneConfig(space=SPACE, **config), RayConfig(**workers), nodes) == expected


def test_tune_is_given_trials_and_told_when_they_end() -> None:
    ready = [Prepared(Trial(0, {"seed": 1}, baseline=True), Path("rows"), eval_steps=4, steps=10), None]
    told = []
    chosen = Chosen(lambda: ready.pop(0), lambda *what: told.append(what))
    assert chosen.suggest("a") == {
        "name": name_of({"seed": 1}),
        "rows": "rows",
        "eval_steps": 4,
        "evaluations": 3,
        "to_the_end": True,
    }
    assert chosen.suggest("b") == "FINISHED"
    chosen.on_trial_complete("a", error=True)
    ((trial, seconds, lost),) = told
    assert (trial.number, lost) == (0, True)
    assert 0 <= seconds < 10


def test_of_what_training_reports_only_evaluations_of_a_trained_model_reach_tune(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("rayembed.jobs.tune_ray.TuneReportCallback.__init__", lambda _: None)
    monkeypatch.setattr("rayembed.jobs.tune_ray.TuneReportCallback.after_report", lambda _, *what: told.append(what))
    reports = Reports(METRIC, eval_steps=4, evaluations=3)
    for metrics in ({"step": 0, METRIC: 0.5}, {"step": 3, "loss": 1.0}, {"step": 4, METRIC: 0.6, "mrr@10": 0.1}):
        reports.after_report("context", [metrics, {"another": "worker"}], "checkpoint")
    reports.after_report("context", [{"step": 10, METRIC: 0.7, "loss": 0.1}], None)
    assert told == [
        ("context", [{EVALUATION: 1, OF: 3, "step": 4, METRIC: 0.6}], None),
        ("context", [{EVALUATION: 3, OF: 3, "step": 10, METRIC: 0.7}], None),
    ]


def test_evaluations_are_as_many_as_fit_and_one_at_the_end() -> None:
    for steps, every, expected in ((10, 4, 3), (8, 4, 2), (3, 4, 1)):
        assert Prepared(Trial(0, {}), Path(), every, steps).evaluations == expected == math.ceil(steps / every)


def test_actors_of_ray_train_are_told_which_ray_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, where a machine has several, the place of a trial that is stopped is never free again."""
    monkeypatch.setenv("RAY_ADDRESS", "another")  # put back afterwards
    monkeypatch.setattr(constants, "ENV_VARS_TO_PROPAGATE", {*constants.ENV_VARS_TO_PROPAGATE})
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    assert "RAY_ADDRESS" not in constants.get_env_vars_to_propagate()
    _name_this_ray()
    assert constants.get_env_vars_to_propagate()["RAY_ADDRESS"] == "10.0.0.1:6379"
