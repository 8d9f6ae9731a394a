"""What trials share and what is their own: mined once, encoded once, and again only where a dimension asks for it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.jobs import run, tune, tune_sweep
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.tune_prepare import EVALUATIONS, Prepared, prepare_shared, prepare_trial, trial_experiment
from rayembed.jobs.tune_trials import Trial, begin, trial_folder
from tests.jobs.conftest import MakeExperiment
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.test_tune_trials import METRIC, write_evaluations
from tests.jobs.toy_data import read_lines
from tests.jobs.without_ray import do_units_here

STEPS = 5  # 80 rows in batches of 16


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units as they are done, here and without Ray."""
    return do_units_here(monkeypatch)


@pytest.fixture(scope="module")
def data(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dev_split(beir, tmp_path_factory.mktemp("data") / "toy")


def prepared(experiment: Experiment, values: list[dict[str, Any]]) -> list[Prepared]:
    folder = Path(experiment.output_dir) / "tune"
    found = []
    for number, own in enumerate(values):
        trial = Trial(number, own)
        begin(folder, trial)
        found.append(prepare_trial(experiment, folder, trial))
    return found


def mined_otherwise(experiment: Experiment) -> Experiment:
    """The same with fewer negatives."""
    assert experiment.mine is not None
    return replace(experiment, mine=replace(experiment.mine, negative_number=3))


def scored_otherwise(experiment: Experiment) -> Experiment:
    """The same with shorter pairs."""
    assert experiment.score is not None
    return replace(experiment, score=replace(experiment.score, max_len=48))


def own_jobs(experiment: Experiment, ready: Prepared) -> list[str]:
    """Which of the jobs before training a trial has done for itself."""
    folder = trial_folder(Path(experiment.output_dir) / "tune", ready.trial.name)
    return [name for name in ("mine", "score") if (folder / name).exists()]


def test_trials_of_training_settings_share_rows_scores_tokens_and_vectors(
    make_experiment: MakeExperiment, data: Path, tiny_reranker: Path, tmp_path: Path, units: list[str]
) -> None:
    score = {"model": str(tiny_reranker), "max_len": 64}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, score=score)
    prepare_shared(experiment)
    assert (tmp_path / "run" / "mine").is_dir()
    assert (tmp_path / "run" / "score").is_dir()
    tune.plan(experiment)
    for other in (mined_otherwise(experiment), scored_otherwise(experiment)):
        refusals = []
        for job in (prepare_shared, tune.plan):
            with pytest.raises(ChangedError, match=r"/(mine|score) was made from something else") as refused:
                job(other)
            refusals.append(str(refused.value))
        assert refusals[0] == refusals[1]
    points = [{"train.temperature": 0.02}, {"train.temperature": 0.1}, {"train.weight_decay": 0.5}]
    first = prepared(experiment, points[:1])
    before = len(units)
    assert {"tokenize", "encode", "score"} <= {unit.split()[0].rstrip(":") for unit in units}
    others = prepared(experiment, points[1:])
    assert len(units) == before  # no text is read again
    assert len({ready.rows for ready in first + others}) == 1
    assert [own_jobs(experiment, ready) for ready in first + others] == [[], [], []]
    teachers = prepared(experiment, [{"score.max_len": 32}, {"mine.negative_number": 2}])  # not what is there
    assert [own_jobs(experiment, ready) for ready in teachers] == [["score"], ["mine", "score"]]
    scored = read_lines(tmp_path / "run" / "score")
    assert len(scored) == 80
    assert "pos_scores" in scored[0]


def test_a_dimension_of_mining_has_each_trial_mine_with_the_vectors_of_all(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, units: list[str]
) -> None:
    space = {"mine.negative_number": {"choice": [2, 4]}, "train.temperature": {"choice": [0.1, 0.2]}}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"space": space})
    prepare_shared(experiment)
    assert not (tmp_path / "run" / "mine").exists()
    tune.plan(mined_otherwise(experiment))  # each trial mines for itself
    points: list[dict[str, Any]] = [{"mine.negative_number": 2}, {"mine.negative_number": 4}]
    first = prepared(experiment, points[:1])
    encoded = [unit for unit in units if unit.startswith("encode")]
    assert encoded
    second = prepared(experiment, points[1:])
    assert [unit for unit in units if unit.startswith("encode")] == encoded
    assert [own_jobs(experiment, ready) for ready in first + second] == [["mine"], ["mine"]]
    folder = tmp_path / "run" / "tune"
    numbers = [
        {len(row["neg"]) for row in read_lines(trial_folder(folder, ready.trial.name) / "mine")}
        for ready in first + second
    ]
    assert numbers == [{2}, {4}]


def test_a_dimension_of_the_teacher_keeps_what_was_mined(
    make_experiment: MakeExperiment, data: Path, tiny_reranker: Path, tmp_path: Path, units: list[str]
) -> None:
    space = {"score.max_len": {"choice": [32, 64]}}
    score = {"model": str(tiny_reranker), "max_len": 64}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"space": space}, score=score)
    prepare_shared(experiment)
    assert [(tmp_path / "run" / name).is_dir() for name in ("mine", "score")] == [True, False]
    (ready,) = prepared(experiment, [{"score.max_len": 32}])
    assert own_jobs(experiment, ready) == ["score"]


def test_a_dimension_of_the_data_that_mining_does_not_read_shares_what_was_mined(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, units: list[str]
) -> None:
    space = {"data.train_group_size": {"choice": [2, 3]}, "model.dropout": {"choice": [0.0, 0.2]}}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"space": space})
    prepare_shared(experiment)
    ready = prepared(experiment, [{"data.train_group_size": 2}, {"data.train_group_size": 3, "model.dropout": 0.2}])
    assert [own_jobs(experiment, one) for one in ready] == [[], []]
    assert len({one.rows for one in ready}) == 1


def test_a_trial_is_an_experiment_of_its_own_with_the_cache_of_all(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path
) -> None:
    sections = {"evaluate": {"k_values": [10]}, "export": {}}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"metric": "mrr@5"}, **sections)
    folder = tmp_path / "run" / "tune"
    trial = Trial(0, {"train.temperature": 0.3})
    own = trial_experiment(experiment, folder, trial, eval_steps=2)
    assert own.train is not None
    assert (own.train.temperature, own.train.eval_steps, own.train.metric_for_best_model) == (0.3, 2, "mrr@5")
    assert own.output_dir == str(folder / "trials" / trial.name)
    assert own.cache_dir == str(tmp_path / "run" / "cache")
    assert (own.tune, own.evaluate, own.export) == (None, None, None)
    assert own.mine == experiment.mine
    as_it_is = trial_experiment(experiment, folder, replace(trial, baseline=True), eval_steps=2)
    assert as_it_is.train is not None
    assert as_it_is.train.temperature == 0.05


@pytest.mark.parametrize(("asked", "expected"), [(None, 1), (2, 2), (100, 100)])
def test_a_trial_is_evaluated_some_times_unless_the_experiment_says_when(
    asked: int | None, expected: int, make_experiment: MakeExperiment, data: Path, tmp_path: Path, units: list[str]
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data, train={"eval_steps": asked, "num_train_epochs": 2})
    prepare_shared(experiment)
    steps = 2 * STEPS
    (ready,) = prepared(experiment, [{"train.temperature": 0.1}])
    assert ready.steps == steps
    assert ready.eval_steps == (expected if asked else -(-steps // EVALUATIONS))
    assert ready.evaluations == -(-steps // ready.eval_steps)


def test_what_cannot_be_trained_is_told_before_a_worker_starts(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, units: list[str]
) -> None:
    space = {"data.train_group_size": {"choice": [2, 9]}, "train.mrl_dims": {"choice": [[], [1000]]}}
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"space": space})
    prepare_shared(experiment)
    with pytest.raises(ValueError, match=r"train\.mrl_dims has 1000, and vectors have 64 dimensions"):
        prepared(experiment, [{"train.mrl_dims": [1000]}])


class SweepHere:
    """In place of Ray Tune: trials that end at once, one after the other, with figures of their values."""

    def __init__(self) -> None:
        self.ran: list[Trial] = []
        self.stop_after = 99

    def __call__(self, experiment: Experiment, folder: Path, *, choose: Any, ended: Any, before: Any) -> None:  # noqa: ANN401
        while len(self.ran) < self.stop_after and (ready := choose()) is not None:
            self.ran.append(ready.trial)
            own = trial_folder(folder, ready.trial.name)
            temperature = ready.trial.values["train.temperature"]
            write_evaluations(own, {0: 0.5, STEPS: temperature}, finished=True)
            ended(ready.trial, 1.0, False)
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, units: list[str]) -> SweepHere:
    """Sweeps without Ray; how often a Ray was asked for is in `sessions`."""
    fake = SweepHere()
    monkeypatch.setattr(tune_sweep, "run_trials", fake)
    monkeypatch.setattr(tune_sweep, "ray_session", lambda _: nullcontext())
    return fake


def test_a_sweep_that_was_interrupted_goes_on_and_one_that_is_done_starts_no_ray(
    make_experiment: MakeExperiment,
    data: Path,
    tmp_path: Path,
    here: SweepHere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"num_samples": 4})
    here.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        tune.run(experiment)
    assert [trial.number for trial in here.ran] == [0, 1]
    here.stop_after = 99
    folder = tune.run(experiment)
    assert [trial.number for trial in here.ran] == [0, 1, 2, 3]
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "job.json", "trials", "results.parquet", "best.yaml", "sweep.json")
    }
    assert "Sweep" in (tmp_path / "run" / "report.html").read_text()

    @contextmanager
    def refused(_: object) -> Iterator[None]:
        pytest.fail("Ray was asked for")
        yield

    monkeypatch.setattr(tune_sweep, "ray_session", refused)
    assert tune.run(experiment) == folder
    assert len(here.ran) == 4


def test_a_dev_split_that_no_trial_can_be_evaluated_on_is_refused_before_the_folder_is_taken(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, here: SweepHere
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data)
    assert experiment.train is not None
    small = replace(experiment, train=replace(experiment.train, eval_steps=1, eval_passages=1))
    with pytest.raises(ValueError, match=r"train\.eval_passages is 1, and"):
        tune.run(small)
    assert not here.ran
    assert not (tmp_path / "run" / "tune").exists()
    tune.run(experiment)
    assert here.ran, "nothing of the refused sweep is in the way"
    with pytest.raises(ValueError, match=r"train\.eval_passages is 1, and"):
        tune.run(small, overwrite=True)


def test_a_sweep_of_another_space_or_experiment_is_refused_with_what_changed(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, here: SweepHere
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data)
    tune.run(experiment)
    assert experiment.tune is not None
    assert experiment.train is not None
    other_space = {**experiment.tune.space, "train.temperature": {"choice": [0.02, 0.2]}}
    changed = {
        "space.train.temperature.choice: was [0.02, 0.1], is [0.02, 0.2]": replace(
            experiment, tune=replace(experiment.tune, space=other_space)
        ),
        "metric: was ndcg@10, is mrr@10": replace(experiment, tune=replace(experiment.tune, metric="mrr@10")),
        "train.weight_decay: was 0.0, is 0.5": replace(experiment, train=replace(experiment.train, weight_decay=0.5)),
        "mine.mine.negative_number: was 4, is 3": replace(experiment, mine=replace(experiment.mine, negative_number=3)),  # type: ignore[type-var]
        "seed: was 42, is 7": replace(experiment, seed=7),
    }
    for line, other in changed.items():
        with pytest.raises(ChangedError) as error:
            tune.run(other)
        assert line in str(error.value)
        for plan in (tune.plan, run.plan):
            with pytest.raises(ValueError, match="use --overwrite to begin anew") as planned:
                plan(other)
            assert line in str(planned.value)
        assert "0 of them done" in tune.plan(other, overwrite=True)
    same = replace(
        experiment,
        tune=replace(experiment.tune, num_samples=4, search="optuna", scheduler="asha", max_concurrent=1),
        train=replace(experiment.train, logging_steps=3),
    )
    tune.run(same)
    assert len(here.ran) == 4
    before = [trial.name for trial in here.ran]
    tune.run(changed["seed: was 42, is 7"], overwrite=True)
    assert [trial.number for trial in here.ran[4:]] == [0, 1, 2]
    assert len(list((tmp_path / "run" / "tune" / "trials").iterdir())) == 3
    assert before


def test_a_dry_run_tells_trials_steps_and_evaluations_and_writes_nothing(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, here: SweepHere
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"max_concurrent": 1})
    found = tune.plan(experiment)
    assert "tune: 3 trials (random over train.temperature, train.learning_rate), 0 of them done" in found
    assert f"each has {STEPS} steps on 80 rows" in found
    assert "every 1 step an evaluation by ndcg@10, 20 queries of split dev against all 120 passages" in found
    assert "1 at a time on this machine" in found
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]
    tune.run(experiment)
    assert "3 of them done" in tune.plan(experiment)


def test_the_figures_of_a_sweep_are_those_of_its_trials(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, here: SweepHere
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"search": "grid", "num_samples": None})
    folder = tune.run(experiment)
    told = json.loads((folder / "sweep.json").read_text())
    assert len(told["trials"]) == 5  # four points, and the experiment as it is
    assert [own[METRIC] for own in told["trials"]] == [0.05, 0.02, 0.02, 0.1, 0.1]
