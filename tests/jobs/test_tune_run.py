"""A sweep by `rayembed run` and from Python: what follows it, and what it gives back; trials here are no trainings."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rayembed
from rayembed.config import Experiment
from rayembed.config.loading import ConfigError, dump, load
from rayembed.jobs import run, tune, tune_sweep
from rayembed.jobs.tune_trials import trial_folder
from tests.jobs.conftest import MakeExperiment
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.test_tune_trials import write_evaluations
from tests.jobs.without_ray import do_units_here

Sweeps = Callable[..., Experiment]


@pytest.fixture(scope="module")
def data(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dev_split(beir, tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Jobs after the sweep with the temperature that they were given; a trial's figure is its temperature."""
    do_units_here(monkeypatch)

    def trials(experiment: Experiment, folder: Path, *, choose: Any, ended: Any, before: Any) -> None:  # noqa: ANN401
        while (ready := choose()) is not None:
            values = ready.trial.values
            write_evaluations(
                trial_folder(folder, ready.trial.name), {0: 0.01, 4: values["train.temperature"]}, finished=True
            )
            ended(ready.trial, 1.0, False)

    monkeypatch.setattr(tune_sweep, "run_trials", trials)
    monkeypatch.setattr(tune_sweep, "ray_session", lambda _: nullcontext())
    noted: list[tuple[str, Any]] = []
    for jobs in (run.JOBS, tune.WINNER):
        for name in ("train", "export"):
            fake = SimpleNamespace(run=_noting(noted, name), plan=_planned(name))
            monkeypatch.setitem(jobs, name, fake)
    return noted


def _planned(name: str) -> Callable[..., str]:
    def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
        assert experiment.train is not None
        return f"{name}: at {experiment.train.temperature}"

    return plan


def _noting(noted: list[tuple[str, Any]], name: str) -> Callable[..., Path]:
    def job(experiment: Experiment, *, overwrite: bool = False) -> Path:
        assert experiment.train is not None
        noted.append((name, (experiment.train.temperature, experiment.tune, experiment.output_dir)))
        return Path(experiment.output_dir) / name

    return job


def test_then_train_goes_on_with_the_best_values_in_the_run_folder(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, done: list[tuple[str, Any]]
) -> None:
    out = str(tmp_path / "run")
    experiment = make_sweep(
        make_experiment, tmp_path / "run", data, tune={"num_samples": 5, "then": "train"}, export={}
    )
    assert "train: at 0.05\nexport: at 0.05" in run.plan(experiment)
    expected = [("train", (0.1, None, out)), ("export", (0.1, None, out))]
    run.run(experiment)
    assert done == expected
    again = load(f"{out}/config.yaml")  # what is in the folder is from these settings
    assert again.train is not None
    assert (again.train.temperature, again.tune) == (0.1, None)
    tune.run(experiment)
    assert done == expected * 2
    assert [line.partition(":")[0] for line in run.plan(experiment).splitlines()] == ["mine", "tune", "train", "export"]
    assert "train: at 0.1\nexport: at 0.1" in run.plan(experiment), "the best values are known now"


def test_without_then_the_sweep_is_the_end(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, done: list[tuple[str, Any]]
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data, export={})
    run.run(experiment)
    tune.run(experiment)
    assert done == []
    assert load(str(tmp_path / "run" / "config.yaml")) == experiment
    assert (tmp_path / "run" / "tune" / "best.yaml").exists()
    assert [line.partition(":")[0] for line in run.plan(experiment).splitlines()] == ["mine", "tune"]


def test_a_space_that_cannot_be_is_refused_before_anything_is_read(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data, tune={"space": {"train.lr": {"choice": [1]}}})
    for job in (run.run, run.plan, tune.run, tune.plan):
        with pytest.raises(
            (ConfigError, ValueError), match=r"train\.lr: unknown key; did you mean train\.learning_rate"
        ):
            job(experiment)
    assert not (tmp_path / "run").exists()


def test_a_sweep_from_python_gives_the_best_values_and_figures(
    make_experiment: MakeExperiment, data: Path, tmp_path: Path, done: list[tuple[str, Any]]
) -> None:
    experiment = make_sweep(make_experiment, tmp_path / "run", data)
    file = tmp_path / "e.yaml"
    file.write_text(dump(experiment))
    space = {"train.temperature": {"choice": [0.02, 0.1]}}
    found = rayembed.tune(file, space, search="grid", num_samples=3, overrides=["seed=7"], max_concurrent=1)
    assert (found.metric, found.best, found.figure) == ("ndcg@10", {"train.temperature": 0.1}, 0.1)
    assert (found.baseline_figure, found.base_figure) == (0.05, 0.01)
    assert [trial.values["train.temperature"] for trial in found.trials] == [0.1, 0.05, 0.02]
    assert found.folder == tmp_path / "run" / "tune"
    best = load(str(found.best_experiment))
    assert best.train is not None
    assert (best.train.temperature, best.seed) == (0.1, 7)
    again = rayembed.tune(load(str(file), ["seed=7"]), space, search="grid", num_samples=3)
    assert again == found
    without = rayembed.tune(file, space, overrides=["seed=7"], baseline=False, num_samples=2, overwrite=True)
    assert without.baseline_figure == 0.05  # trials that are there stay
    with pytest.raises(ConfigError, match=r"rayembed\.tune: tune\.num_sample: unknown key"):
        rayembed.tune(file, space, num_sample=3)
    with pytest.raises(ValueError, match="overrides are of a file"):
        rayembed.tune(experiment, space, overrides=["seed=7"])


def test_importing_the_package_loads_nothing_heavy_until_it_is_used() -> None:
    code = (
        "import sys, rayembed\n"
        "heavy = {'torch', 'ray', 'transformers', 'pydantic', 'optuna'}\n"
        "print(sorted(heavy & set(sys.modules)), rayembed.__version__, hasattr(rayembed, 'no_such_name'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"[] {rayembed.__version__} False"
