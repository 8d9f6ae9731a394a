"""Jobs on four hosts with networks of their own; one is killed and one cut off in mid-job, and nothing is lost."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.jobs import mine, score, train, tune
from rayembed.jobs.tune_trials import known_trials
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.hosts import Hosts, hosts
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.test_elastic import assert_same_result
from tests.jobs.toy_data import write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]
UNITS = {"passages_per_unit": 5, "queries_per_unit": 4}


@pytest.fixture
def three(ray_environment: None) -> Iterator[Hosts]:
    """A head on which the driver runs, and three workers with a CPU each."""
    with hosts(3, {"OMP_NUM_THREADS": "1"}) as made:
        yield made


@dataclass(frozen=True)
class Driver:
    """A `rayembed` on the head."""

    process: "Popen[bytes]"
    log: Path

    def wait_for(self, seen: Callable[[], bool], *, within: float = 240) -> None:
        deadline = time.monotonic() + within
        while not seen():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def finish(self, *, within: float = 300) -> str:
        assert self.process.wait(within) == 0, self.log.read_text()
        return self.log.read_text()


def start(made: Hosts, job: str, experiment: Experiment) -> Driver:
    out = Path(experiment.output_dir)
    file, log = out.with_name("experiment.yaml"), out.with_name("driver.log")
    file.write_text(dump(experiment))
    return Driver(made.start([Path(sys.executable).with_name("rayembed"), job, file], log), log)


def units_done(out: Path) -> int:
    return len(list(out.glob("**/done/*.json")))


def digest(folder: Path) -> str:
    """Of the rows in their order, however they are cut into files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl")))).hexdigest()


def lose_two(made: Hosts, driver: Driver, first: Callable[[], bool], second: Callable[[], bool]) -> None:
    """Kills one host and cuts another one off."""
    driver.wait_for(first)
    made.workers[0].kill()
    driver.wait_for(second)
    made.workers[1].cut_off()
    assert driver.process.poll() is None, "lost while it works, or nothing is shown"


def test_mining(local_ray: None, three: Hosts, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "mine": {"range_for_sampling": "0-40", "negative_number": 11, "sampling_strategy": "random"}
    }
    mine.run(make_experiment(tmp_path / "alone", **settings))
    out = tmp_path / "run"
    experiment = make_experiment(out, **settings, encode=UNITS, ray={"num_workers": 3})
    driver = start(three, "mine", experiment)
    lose_two(three, driver, lambda: units_done(out) >= 6, lambda: units_done(out) >= 20)
    driver.finish()
    assert digest(out / "mine") == digest(tmp_path / "alone" / "mine")


def test_teacher_scoring(
    local_ray: None,
    three: Hosts,
    make_experiment: MakeExperiment,
    beir: Path,
    tiny_reranker: Path,
    tmp_path: Path,
) -> None:
    rows = write_rows(beir, tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {"data": {"train": [str(rows)]}, "score": {"model": str(tiny_reranker), "max_len": 64}}
    score.run(make_experiment(tmp_path / "alone", **settings, encode={"queries_per_unit": 4}))
    out = tmp_path / "run"
    driver = start(three, "score", make_experiment(out, **settings, encode=UNITS, ray={"num_workers": 3}))
    lose_two(three, driver, lambda: units_done(out) >= 3, lambda: units_done(out) >= 8)
    driver.finish()
    assert digest(out / "score") == digest(tmp_path / "alone" / "score")


def test_training(local_ray: None, three: Hosts, make_experiment: MakeExperiment, beir: Path, tmp_path: Path) -> None:
    """It goes on with two workers, then with one."""
    rows = write_rows(beir, tmp_path / "rows.jsonl")
    steps = {"global_batch_size": 12, "max_steps": 150, "save_steps": 10, "learning_rate": 1e-4}
    alone = make_experiment(
        tmp_path / "alone",
        data={"train": [str(rows)]},
        model={"dropout": 0.0},
        train={**TRAIN, **steps},
        export={"probe_texts": 8},
    )
    train.run(alone)
    out = tmp_path / "run"
    ray = replace(alone.ray, num_workers=(1, 3), max_failures=5, timeout_s=15)
    driver = start(three, "train", replace(alone, output_dir=str(out), ray=ray))

    def saved(step: int) -> bool:
        folder = out / "train.partial" / "checkpoints"
        return any(int(path.name.removeprefix("step-")) >= step for path in folder.glob("step-*"))

    def trains_again() -> bool:
        return "queries on 2 workers" in driver.log.read_text() and saved(60)

    driver.wait_for(lambda: "queries on 3 workers" in driver.log.read_text())
    lose_two(three, driver, lambda: saved(30), trains_again)
    output = driver.finish()
    assert "queries on 1 worker," in output
    assert_same_result(replace(alone, output_dir=str(out)), alone)


@pytest.mark.timeout(1200)
def test_a_sweep(local_ray: None, three: Hosts, make_experiment: MakeExperiment, beir: Path, tmp_path: Path) -> None:
    """Three trials at a time; those of the lost hosts go on elsewhere, from their last checkpoints."""
    data = with_dev_split(beir, tmp_path / "data")
    settings: dict[str, Any] = {"eval_steps": 60, "max_steps": 120, "save_steps": 10}
    settings["per_device_train_batch_size"] = 4
    alone = make_sweep(make_experiment, tmp_path / "alone", data, tune={"num_samples": 4}, train=settings)
    tune.run(alone)
    out = tmp_path / "run"
    ray = replace(alone.ray, max_failures=5, timeout_s=15)
    driver = start(three, "tune", replace(alone, output_dir=str(out), ray=ray))

    def saved(step: int) -> int:
        """Trials that have a checkpoint of this step or a later one, or have ended."""
        found = out.glob("tune/trials/*/train*/checkpoints/step-*")
        begun = {path.parents[2].name for path in found if int(path.name.removeprefix("step-")) >= step}
        return len(begun | {path.parent.name for path in out.glob("tune/trials/*/result.json")})

    lose_two(three, driver, lambda: saved(30) >= 3, lambda: saved(90) >= 3)
    output = driver.finish(within=600)
    assert "3 trials at a time" in output
    assert "resumed after step" in output
    ours, theirs = (known_trials(Path(own.output_dir) / "tune") for own in (replace(alone, output_dir=str(out)), alone))
    found, expected = (
        {own.name: own.result and (own.result.status, own.result.evaluations) for own in trials}
        for trials in (ours, theirs)
    )
    assert len(found) == 4
    assert found == expected
