"""Sweeps on an object store without Ray: what lies there, how often it is sent, and who can go on with it."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rayembed
from rayembed.config import Experiment
from rayembed.config.loading import load
from rayembed.data import copies, mirror, storage
from rayembed.data.store import Store
from rayembed.jobs import train, tune, tune_ray, tune_sweep
from rayembed.jobs.as_trial import AsTrial
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.tune_prepare import Prepared
from rayembed.jobs.tune_trials import FAILURE, Failure, known_trials, note_failure, trial_folder
from tests.data.machines import URI, Machines
from tests.jobs.conftest import MakeExperiment
from tests.jobs.small_sweeps import make_sweep, with_dev_split
from tests.jobs.test_object_store import assert_clean, files_of, noted_keys
from tests.jobs.test_tune_trials import METRIC
from tests.jobs.without_ray import do_units_here
from tests.s3_server import KEYS

PLACE = "s3://bucket/runs/one"
CHECKPOINT = "checkpoints/step-00000002/weights.bin"


def checkpoint_of(folder: Path, ready: Prepared) -> Path:
    return trial_folder(folder, ready.trial.name) / "train.partial" / CHECKPOINT


class TrialsElsewhere:
    """In place of Ray Tune: trials that end at once, on a machine with a disk of its own; figures are temperatures."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self.ran: list[int] = []
        self.resumed: list[str] = []
        self.killed_in = -1

    def __call__(self, experiment: Experiment, folder: Path, *, choose: Any, ended: Any, before: Any) -> None:  # noqa: ANN401
        told = json.loads(json.dumps(copies.registered()))
        while (ready := choose()) is not None:
            number = ready.trial.number
            with self._machines.away(f"node {number}"):
                own = trial_folder(Path(copies.as_here(str(folder), told)), ready.trial.name)
                mirror.refresh(own)
                self.write(own, number, ready.trial.values["train.temperature"])
            self.ran.append(number)
            ended(ready.trial, 1.0, False)
            if number == 2:
                with self._machines.away("node 2"):  # whose worker was not killed yet
                    storage.write_atomic(Path(copies.as_here(str(checkpoint_of(folder, ready)), told)), b"w")

    def write(self, own: Path, number: int, temperature: float) -> None:
        """What the job train leaves: all of it, what it has half way, or a word of why there is nothing."""
        working = own / "train.partial"
        self.resumed += [path.name for path in working.glob("checkpoints/*")]
        storage.write_atomic(working / "job.json", b"{}")
        lines = [{"step": 0, "eval": {METRIC: 0.01}}, {"step": 2, "eval": {METRIC: temperature}}]
        storage.write_atomic(working / "evaluations.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        if number == 2:
            note_failure(own, Failure("the loss of step 3 is not finite", again=False))
            return
        storage.write_atomic(working / CHECKPOINT, b"w")
        if number == self.killed_in:
            raise KeyboardInterrupt
        (own / "model").mkdir()
        (own / "model" / "config.json").write_text("{}")
        mirror.send_whole(own / "model")
        storage.publish_folder(own / "train")


@pytest.fixture
def machines(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Machines:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return machines


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, machines: Machines) -> TrialsElsewhere:
    do_units_here(monkeypatch)
    elsewhere = TrialsElsewhere(machines)
    monkeypatch.setattr(tune_sweep, "run_trials", elsewhere)
    monkeypatch.setattr(tune_sweep, "ray_session", lambda _: nullcontext())
    return elsewhere


@pytest.fixture
def experiment(make_experiment: MakeExperiment, beir: Path, tmp_path: Path) -> Experiment:
    """A sweep on the store; without mining, which is tried elsewhere."""
    data = with_dev_split(beir, tmp_path / "toy")
    asked = make_sweep(make_experiment, tmp_path / "run", data, data={"train_group_size": 1}, tune={"num_samples": 4})
    return replace(asked, mine=None, output_dir=URI)


def test_the_store_has_all_of_a_sweep_once_and_nothing_of_the_keys(
    machines: Machines, experiment: Experiment, trials: TrialsElsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.use("driver")
    asked = noted_keys(monkeypatch)
    folder = tune.run(experiment)
    assert copies.shown(folder) == f"{PLACE}/tune"
    there = files_of(machines.store)
    own = {trial.number: f"tune/trials/{trial.name}" for trial in known_trials(folder)}
    expected = {"report.html", *(f"tune/{name}" for name in ("config.yaml", "job.json", "sweep.json"))}
    expected |= {"tune/results.parquet", "tune/best.yaml"}
    expected |= {f"{path}/{name}.json" for path in own.values() for name in ("trial", "result")}
    of_training = ("job.json", "evaluations.jsonl", "_SUCCESS")
    expected |= {f"{own[number]}/train/{name}" for number in (0, 1, 3) for name in of_training}
    expected |= {f"{own[2]}/{name}" for name in ("failure.json", "train/job.json", "train/evaluations.jsonl")}
    expected |= {f"{own[2]}/train/_PARTIAL"}
    found = {name for name in there if not name.startswith("cache/")}
    assert found == expected, "models and checkpoints are removed, those of the failed trial too"
    assert_clean(there)
    assert pq.read_table(folder / "results.parquet").column("status").to_pylist() == ["done", "done", "failed", "done"]
    assert trials.ran == [0, 1, 2, 3]

    written = [key for key in asked["_write"] if not key.startswith("cache/")]
    of_trials = [key for key in written if "/trials/" in key and not key.endswith(("_SUCCESS", "_PARTIAL"))]
    assert len(of_trials) == len(set(of_trials)), "nothing of a trial is sent twice"
    assert written.count("tune/results.parquet") == 4, "as often as a trial ended"
    in_cache = [key for key in asked["_write"] if key.startswith("cache/") and not key.endswith("_PARTIAL")]
    assert len(in_cache) == len(set(in_cache)), "nor what trials share"

    best = load(str(folder / "best.yaml"))
    assert (best.output_dir, best.cache_dir) == (URI.replace("one", "one-best"), URI.replace("one", "one/cache"))
    assert f"# Trial 3 of {PLACE}/tune" in (folder / "best.yaml").read_text()
    assert load(str(folder / "config.yaml")).output_dir == URI

    machines.use("other")
    for names in asked.values():
        names.clear()
    assert "4 of them done" in tune.plan(experiment)
    assert copies.shown(tune.run(experiment)) == f"{PLACE}/tune"
    assert trials.ran == [0, 1, 2, 3]
    assert asked["_write"] == ["report.html"]
    assert asked["delete"] == asked["delete_all"] == []
    assert not [key for key in asked["_get"] if key.startswith("cache/") and "tokens" in key and ".npy" in key]


def test_killed_with_its_machine_it_goes_on_elsewhere_and_from_python(
    machines: Machines, experiment: Experiment, trials: TrialsElsewhere
) -> None:
    machines.use("driver")
    trials.killed_in = 1
    with pytest.raises(KeyboardInterrupt):
        tune.run(experiment)
    half = {name: text for name, text in machines.there().items() if name.endswith(("trial.json", "result.json"))}
    assert len(half) == 3
    machines.use("other")
    trials.killed_in = -1
    assert "1 of them done" in tune.plan(experiment)
    found = rayembed.tune(experiment)
    assert trials.ran == [0, 1, 2, 3]
    assert trials.resumed == ["step-00000002"]
    assert half.items() <= machines.there().items()
    assert found.figure == max(trial.values["train.temperature"] for trial in found.trials if trial.number != 2)
    machines.use("last")
    again = rayembed.tune(experiment)
    assert again.trials == found.trials
    assert pq.read_table(again.folder / "results.parquet").num_rows == 4
    assert load(str(again.best_experiment)).tune is None


def test_another_sweep_in_its_place_is_refused_or_begun_anew(
    machines: Machines, experiment: Experiment, trials: TrialsElsewhere
) -> None:
    machines.use("driver")
    tune.run(experiment)
    other = replace(experiment, seed=7)
    with pytest.raises(ChangedError, match=rf"{PLACE}/tune is a sweep of something else:\n  seed: was 42"):
        tune.run(other)
    assert trials.ran == [0, 1, 2, 3]
    storage.write_atomic(copies.local(URI) / "tune" / "trials" / "old" / "metrics.jsonl", b"")
    tune.run(other, overwrite=True)
    assert trials.ran == [0, 1, 2, 3] * 2
    assert len([name for name in machines.there() if name.endswith("trial.json")]) == 4
    assert not [name for name in machines.there() if "/old/" in name]


def test_a_trial_finds_its_folder_and_rows_on_a_machine_with_another_disk(
    machines: Machines, experiment: Experiment, trials: TrialsElsewhere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when the Ray of a cluster was started with a scratch folder of its own."""
    told: dict[str, Any] = {}
    seen: list[Experiment] = []

    def run_trials(experiment: Experiment, folder: Path, *, choose: Any, ended: Any, before: Any) -> None:  # noqa: ANN401
        ready = choose()
        config = tune_ray.Chosen(lambda: ready, ended).suggest("a")
        note_failure(trial_folder(folder, ready.trial.name), Failure("of an earlier try", again=True))
        text = tune_ray._EXPERIMENT.dump_json(experiment).decode()
        told.update(experiment=text, tune_folder=str(folder), cwd="", copies=copies.registered())
        with machines.away("elsewhere"):
            tune_ray.train_trial(config, **told)
        ended(ready.trial, 1.0, True)
        raise KeyboardInterrupt

    def trained(own: Experiment, *, trial: AsTrial) -> None:
        seen.append(own)
        assert not mirror.is_there(Path(own.output_dir) / FAILURE)
        assert isinstance(trial.rows, Store)
        assert str(trial.rows.folder).startswith(str(tmp_path / "elsewhere"))
        assert trial.rows.read_part(0).num_rows > 0
        raise ValueError("a value is refused")

    monkeypatch.setattr(tune_sweep, "run_trials", run_trials)
    monkeypatch.setattr(tune_ray, "_name_this_ray", lambda: None)
    monkeypatch.setattr(tune_ray.TuneReportCallback, "__init__", lambda _: None)
    monkeypatch.setattr(train, "run", trained)
    root = machines.use("driver")
    with pytest.raises(KeyboardInterrupt):
        tune.run(experiment)
    (own,) = seen
    assert own.output_dir.startswith(str(tmp_path / "elsewhere"))
    assert str(own.cache_dir).startswith(str(tmp_path / "elsewhere"))
    (trial,) = known_trials(root / "tune")
    assert trial.result is not None
    assert trial.result.failure == Failure("a value is refused", again=False)
    failures = [content for name, content in machines.there().items() if name.endswith(FAILURE)]
    assert [json.loads(content)["error"] for content in failures] == ["a value is refused"]


def test_a_cache_on_the_store_of_a_sweep_that_is_not(
    machines: Machines, experiment: Experiment, trials: TrialsElsewhere, tmp_path: Path
) -> None:
    machines.use("driver", refreshed=False)
    copies._MIRRORS.clear()
    own = replace(experiment, output_dir=str(tmp_path / "run"), cache_dir=URI)
    found = rayembed.tune(own)
    assert trials.ran == [0, 1, 2, 3]
    assert found.folder == tmp_path / "run" / "tune"
    assert {name.split("-")[0] for name in machines.there()} == {"dev", "passages", "queries", "rows", "tokens"}
    best = load(str(found.best_experiment))
    assert (best.output_dir, best.cache_dir) == (f"{tmp_path / 'run'}-best", URI)
    ((_, _, kind),) = copies.registered()
    assert kind == copies.SHARED
