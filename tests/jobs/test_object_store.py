"""Run folders on S3: the same results, nothing done twice, nothing lost, nothing of the keys."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.config.ray import RayConfig
from rayembed.data import copies
from rayembed.data.object_store import ObjectStore
from rayembed.jobs import check, encode, evaluate, harvest, merge, mine, score, split, units
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.units import Unit, UnitActor, UnitError, Work
from tests.jobs.conftest import MakeExperiment
from tests.jobs.units_here import actor_for, done_by
from tests.jobs.without_ray import do_units_here
from tests.s3_server import KEYS, Server, new_machine

MINE = {"range_for_sampling": "2-20", "negative_number": 3}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for job in (encode,):
        monkeypatch.setattr(job, "ray_session", lambda _: nullcontext())
    return do_units_here(monkeypatch)


def results(files: dict[str, bytes], job: str) -> dict[str, bytes]:
    """Of a job what does not say when and how long it was done, and no marks of the store."""
    own = {name.removeprefix(f"{job}/"): content for name, content in files.items() if name.startswith(f"{job}/")}
    return {name: content for name, content in own.items() if "done/" not in name and not name.startswith("_")}


def noted_keys(patch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Keys that the store is asked for from now on, by what it is asked; lists that grow."""
    found: dict[str, list[str]] = {name: [] for name in ("_get", "_write", "delete", "delete_all")}

    def noting(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def note(own: ObjectStore, key: str, *arguments: object) -> object:
            found[name].append(key)
            return method(own, key, *arguments)

        return note

    for name in found:
        patch.setattr(ObjectStore, name, noting(name, getattr(ObjectStore, name)))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_clean(files: dict[str, bytes]) -> None:
    """No key of the environment, and no path of this machine's copy."""
    for name, content in files.items():
        for value in (KEYS["AWS_SECRET_ACCESS_KEY"], KEYS["AWS_ACCESS_KEY_ID"], os.environ["RAYEMBED_SCRATCH"]):
            assert value.encode() not in content, name


def jobs_of(experiment: Experiment) -> list[tuple[ModuleType, Experiment]]:
    rows = replace(experiment, mine=None, score=None)
    return [
        (check, experiment),
        (mine, experiment),
        (score, experiment),
        (evaluate, experiment),
        (encode, replace(experiment, encode=replace(experiment.encode, output_format="npy", output_dtype="int8"))),
        (split, replace(rows, split={"length_list": [0, 8, 16]})),  # type: ignore[arg-type] # pydantic reads the dict
    ]


@pytest.mark.long
def test_every_job_gives_what_it_gives_in_a_local_folder(
    server: Server, done: list[str], make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path
) -> None:
    teacher = {"model": str(tiny_model), "max_len": 64}
    experiment = make_experiment(tmp_path / "run", mine=MINE, score=teacher, evaluate={})
    for job, own in jobs_of(experiment):
        job.run(own)
    ours, local = files_of(tmp_path / "run"), len(done)
    done.clear()
    for job, own in jobs_of(replace(experiment, output_dir=server.uri("some/run"))):
        job.run(own)
    theirs = server.files("some/run")
    assert len(done) == local
    for job, _ in jobs_of(experiment)[1:]:
        name = job.__name__.rpartition(".")[2]
        assert f"{name}/_SUCCESS" in theirs
        assert results(theirs, name) == results(ours, name)
    assert theirs["check.txt"] == ours["check.txt"]
    assert theirs["config.yaml"].decode() == ours["config.yaml"].decode().replace(
        str(tmp_path / "run"), server.uri("some/run")
    )
    assert_clean(theirs)
    assert not [name for name in theirs if name.endswith(".partial") or "/." in name or name.endswith("_PARTIAL")]


def test_a_machine_that_was_never_here_has_nothing_to_do(
    server: Server, done: list[str], make_experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(make_experiment(tmp_path, mine=MINE, evaluate={}), output_dir=server.uri("run"))
    mine.run(experiment)
    evaluate.run(experiment)
    done.clear()
    new_machine(monkeypatch, tmp_path / "other")
    asked = noted_keys(monkeypatch)
    assert "is up to date" in mine.plan(experiment)
    assert mine.run(experiment).name == "mine"
    assert copies.shown(evaluate.run(experiment)) == "s3://bucket/run/evaluate"
    assert done == []
    assert not [key for key in asked["_get"] if "vectors" in key and ".npy" in key], "not needed"
    assert asked["_write"] == asked["delete"] == asked["delete_all"] == []

    changed = replace(experiment, mine={**MINE, "negative_number": 2})  # type: ignore[arg-type] # pydantic reads it
    with pytest.raises(ChangedError, match=r"s3://bucket/run/mine was made from something else:\n  mine.negative_n"):
        mine.run(changed)
    mine.run(changed, overwrite=True)
    line = json.loads(server.files("run/mine")["part-00000.jsonl"].splitlines()[0])
    assert len(line["neg"]) == 2
    assert {name.split(":")[0] for name in done} == {"write rows"}, "vectors and candidates are still there"


def test_killed_half_way_it_goes_on_elsewhere_and_does_nothing_twice(
    server: Server, done: list[str], make_experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(make_experiment(tmp_path, mine=MINE), output_dir=server.uri("run"))
    everything = units._stream

    def killed_at(number: int) -> Callable[..., Iterator[dict[str, str]]]:
        def stream(*arguments: Any) -> Iterator[dict[str, str]]:  # noqa: ANN401
            for row in everything(*arguments):  # type: ignore[attr-defined]
                yield row  # type: ignore[misc]
                if len(done) == number:
                    raise KeyboardInterrupt

        return stream

    total = 13
    for machine, number in enumerate((3, 7, total - 1)):
        new_machine(monkeypatch, tmp_path / f"machine-{machine}")
        monkeypatch.setattr(units, "_stream", killed_at(number))
        with pytest.raises(KeyboardInterrupt):
            mine.run(experiment)
        assert len(done) == number
        assert "mine/_SUCCESS" not in server.files("run")
    new_machine(monkeypatch, tmp_path / "last")
    monkeypatch.setattr(units, "_stream", everything)
    assert "was left half done and would be resumed" in mine.plan(experiment)
    mine.run(experiment)
    assert len(done) == total

    local = replace(experiment, output_dir=str(tmp_path / "run"))
    mine.run(local)
    assert results(server.files("run"), "mine") == results(files_of(tmp_path / "run"), "mine")


@pytest.mark.long
@pytest.mark.parametrize("how", ["500", "cut"])
def test_a_file_that_cannot_be_sent_costs_its_unit_alone(
    proxied: Server, done: list[str], make_experiment: MakeExperiment, tmp_path: Path, how: str
) -> None:
    experiment = replace(make_experiment(tmp_path, mine=MINE), output_dir=proxied.uri("run"))
    proxied.how, proxied.failing = how, "/mine/part-00001.jsonl"
    with pytest.raises(UnitError) as caught:
        mine.run(experiment)
    message = str(caught.value)
    assert "write rows: 1 of 3 units failed, the others are kept in s3://bucket/run/mine:" in message
    assert "writing s3://bucket/run/mine/part-00001.jsonl (" in message
    assert "what was there before is whole. Run the same command again to go on" in message
    assert len(proxied.failures) >= 3, "it was tried again"
    there = proxied.files("run/mine")
    assert {"done/part-00000.json", "done/part-00002.json", "part-00000.jsonl", "_PARTIAL"} <= set(there)
    assert not {"done/part-00001.json", "part-00001.jsonl", "_SUCCESS"} & set(there)

    proxied.failing = ""
    done.clear()
    mine.run(experiment)
    assert done == ["write rows: part-00001"]
    assert "_SUCCESS" in proxied.files("run/mine")


@pytest.mark.long
def test_what_was_there_before_stays_when_the_driver_cannot_write(
    proxied: Server, done: list[str], make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    experiment = replace(make_experiment(tmp_path, evaluate={}), output_dir=proxied.uri("run"))
    proxied.failing = "/evaluate/metrics.json"
    with pytest.raises(
        OSError, match=r"writing s3://bucket/run/evaluate/metrics.json \(\d+ bytes\) failed: .*again to go"
    ):
        evaluate.run(experiment)
    assert "_SUCCESS" not in proxied.files("run/evaluate")
    proxied.failing = ""
    done.clear()
    evaluate.run(experiment)
    before = proxied.files("run/evaluate")
    assert done == []
    assert {"_SUCCESS", "metrics.json", "base.trec"} <= set(before)

    proxied.failing, proxied.how = "/check.txt", "cut"
    check_there = proxied.files("run").get("check.txt")
    with pytest.raises(OSError, match=r"check\.txt"):
        check.run(experiment)
    assert proxied.files("run").get("check.txt") == check_there
    assert proxied.files("run/evaluate") == before


def test_without_the_right_to_write_it_says_what_to_set(
    server: Server, done: list[str], make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    uri = server.uri("run").replace("s3://bucket", "s3://no-such-bucket")
    with pytest.raises(
        OSError, match=r"no-such-bucket/run/.* failed: .*NO_SUCH_BUCKET.*Create the bucket, or set outp"
    ):
        mine.run(replace(make_experiment(tmp_path, mine=MINE), output_dir=uri))


class Machines:
    """In place of Ray: workers on machines with scratch folders of their own take turns; the driver has another."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
        self._patch, self._folder = patch, folder
        self._known: list[dict[str, Any]] = [{} for _ in range(number)]
        self.done: list[str] = []
        patch.setattr(units, "_stream", self._stream)

    @contextmanager
    def on(self, machine: int) -> Iterator[None]:
        with self._patch.context() as patch:
            patch.setattr(copies, "_MIRRORS", self._known[machine])
            patch.setenv("RAYEMBED_SCRATCH", str(self._folder / f"node-{machine}"))
            yield

    def _stream(
        self, pending: Sequence[Unit], work: Work, config: RayConfig, use_gpu: bool
    ) -> Iterator[dict[str, str]]:
        told = json.loads(json.dumps(copies.registered()))
        actors: list[UnitActor] = []
        for machine in range(len(self._known)):
            with self.on(machine):
                actors.append(actor_for(work, copies=told))
        for number, unit in enumerate(pending):
            machine = number % len(self._known)
            with self.on(machine):
                row = done_by(actors[machine], unit, work)
            self.done.append(f"{work.what} {unit.name} on {machine}")
            yield row


@pytest.mark.long
def test_machines_share_nothing_but_the_store(
    server: Server, make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a disk of its own; one of them was at work on another run of the same name before."""
    for job in (mine, score, evaluate, encode):
        monkeypatch.setattr(job, "ray_session", lambda _: nullcontext())
    sections: dict[str, Any] = {"mine": {**MINE, "denoise": True, "denoise_margin": 0.1}, "evaluate": {}}
    sections["search"] = {"backend": "hnsw", "passages_per_index": 64, "passages_per_unit": 64}
    sections["score"] = {"model": str(tiny_model), "max_len": 64}
    experiment = make_experiment(tmp_path / "run", **sections)
    machines = Machines(monkeypatch, tmp_path / "nodes", 2)
    remote = replace(experiment, output_dir=server.uri("run"), cache_dir=server.uri("cache"))
    mine.run(replace(remote, seed=1))
    before = len(machines.done)
    mine.run(remote, overwrite=True)
    assert {line[-1] for line in machines.done[before:]} == {"0", "1"}
    for job in (score, evaluate, encode):
        job.run(remote)
    there = server.files("run")
    do_units_here(monkeypatch)
    for job in (mine, score, evaluate, encode):
        job.run(experiment)
        name = job.__name__.rpartition(".")[2]
        assert results(there, name) == results(files_of(tmp_path / "run"), name)
    assert {name.split("/")[0] for name in there} == {"config.yaml", "mine", "score", "evaluate", "encode"}
    assert any(name.startswith("vectors-") for name in server.files("cache"))


def test_a_harvest_on_the_store(server: Server, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    section = {"output": server.uri("data/docs"), "packages": ["yaml"], "min_passage_words": 3}
    experiment = make_experiment(tmp_path / "run", harvest=section)
    assert "does not exist yet" in harvest.plan(experiment)
    folder = harvest.run(experiment)
    assert copies.shown(folder) == "s3://bucket/data/docs"
    there = server.files("data/docs")
    assert {"corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "harvest.json", "_SUCCESS"} <= set(there)
    assert "is up to date" in harvest.plan(experiment)
    other = make_experiment(tmp_path / "run", harvest={**section, "min_passage_words": 4})
    with pytest.raises(ValueError, match="s3://bucket/data/docs was harvested from something else"):
        harvest.run(other)
    harvest.run(other, overwrite=True)
    assert server.files("data/docs")["harvest.json"] != there["harvest.json"]
    data = {"train": [server.uri("data/docs")], "corpus": [], "evaluation": None}
    check.run(replace(make_experiment(tmp_path / "run", data=data), output_dir=server.uri("run")))
    assert b"rows" in server.files("run")["check.txt"]


def test_merge_refuses_what_it_refuses_elsewhere(
    server: Server, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no section merge"):
        merge.run(replace(make_experiment(tmp_path), output_dir=server.uri("run")))
    assert server.files("run") == {}
