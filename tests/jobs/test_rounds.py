"""Rounds of mining and training: what each round reads and writes, and a whole run of two."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayembed.config import Experiment
from rayembed.config.loading import load
from rayembed.jobs import mine, run
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.rounds import rounds_of
from rayembed.models.loading import weights_fingerprint
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.toy_data import NUM_TRAIN, read_lines
from tests.jobs.without_ray import do_units_here

JOBS = ("mine", "score", "train", "model", "evaluate")
MINE = {"range_for_sampling": "2-20", "negative_number": 4}


@pytest.fixture(scope="module")
def asked(make_experiment: MakeExperiment, tiny_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two rounds of two steps each."""
    return make_experiment(
        tmp_path_factory.mktemp("rounds") / "run",
        mine={**MINE, "rounds": 2, "denoise": True, "denoise_margin": 0.0},
        score={"model": str(tiny_reranker), "max_len": 64},
        train={**TRAIN, "max_steps": 2},
        evaluate={"k_values": [10]},
    )


def test_each_round_has_its_folder_and_the_model_of_the_one_before(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path
) -> None:
    own = {"model": "a/miner", "pooling": "cls", "query_instruction_for_retrieval": "q: "}
    own["passage_instruction_for_retrieval"] = "p: "
    sections: dict[str, Any] = {"train": TRAIN, "evaluate": {}, "export": {}}
    model = {"query_instruction_for_retrieval": "ask: "}
    experiment = make_experiment(tmp_path, mine={**MINE, **own, "rounds": 3}, model=model, **sections)
    rounds = rounds_of(experiment)
    folders = [str(tmp_path / "rounds" / "1"), str(tmp_path / "rounds" / "2"), str(tmp_path)]
    assert [one.number for one in rounds] == [1, 2, 3]
    assert [one.trains.output_dir for one in rounds] == [one.compares.output_dir for one in rounds] == folders
    bases = [str(tiny_model), f"{folders[0]}/model", f"{folders[1]}/model"]
    assert [one.trains.model.name_or_path for one in rounds] == bases
    for one in rounds:
        assert one.trains.cache() == one.compares.cache() == experiment.cache(), "what is cached serves all"
        assert one.compares.model == experiment.model
        assert replace(one.trains.model, name_or_path=str(tiny_model)) == experiment.model
        assert one.trains.mine is not None
        assert one.trains.mine.rounds == 1
        assert (one.trains.train, one.trains.data, one.trains.seed) == (experiment.train, experiment.data, 42)
    assert [one.compares.export for one in rounds] == [None, None, experiment.export], "of the result alone"
    assert experiment.mine is not None
    first, *later = [one.trains.mine for one in rounds]
    assert first == replace(experiment.mine, rounds=1), "the first mines with mine.model"
    nobody: dict[str, Any] = dict.fromkeys(own)
    for section in later:
        assert section == replace(experiment.mine, rounds=1, **nobody)


def test_one_round_is_the_run_folder(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, mine=MINE, train=TRAIN)
    (only,) = rounds_of(experiment)
    cached = replace(experiment, cache_dir=experiment.cache())
    assert only.trains == only.compares == cached
    with pytest.raises(ValueError, match="the experiment has none; add one"):
        rounds_of(replace(experiment, mine=None))


def test_mine_alone_has_no_rounds(asked: Experiment) -> None:
    with pytest.raises(ValueError, match=r"mine\.rounds is 2: rounds are of `rayembed run`"):
        mine.plan(asked)


def test_a_plan_tells_of_the_first_round_and_how_many_there_are(asked: Experiment, tmp_path: Path) -> None:
    plan = run.plan(replace(asked, output_dir=str(tmp_path / "run")))
    assert f"mine: {NUM_TRAIN} queries against 120 passages" in plan
    assert "rounds: 2 times mine to evaluate" in plan


@pytest.fixture(scope="module")
def done(asked: Experiment, local_ray: None) -> Iterator[list[str]]:
    """The run, whose trainings are in Ray; units that are done from then on."""
    with pytest.MonkeyPatch.context() as patch:
        units = do_units_here(patch)
        run.run(asked)
        units.clear()
        yield units


def record(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "job.json").read_text())
    return value


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_of_two_rounds_trains_the_model_of_the_first_on(
    asked: Experiment, done: list[str], tiny_model: Path
) -> None:
    out = Path(asked.output_dir)
    first = out / "rounds" / "1"
    assert [path.name for path in (out / "rounds").iterdir()] == ["1"]
    for folder in (first, out):
        assert [name for name in JOBS if not (folder / name).is_dir()] == []
        assert len(read_lines(folder / "score")) == NUM_TRAIN
        assert len(read_lines(folder / "train" / "metrics.jsonl")) == 2
    base, between, result = (weights_fingerprint(str(path)) for path in (tiny_model, first / "model", out / "model"))
    assert len({base, between, result}) == 3
    assert [record(folder / "mine")["weights"] for folder in (first, out)] == [[base], [between]]
    assert [record(folder / "train")["weights"] for folder in (first, out)] == [base, between]
    weights = [record(folder / "evaluate")["weights"] for folder in (first, out)]
    assert weights == [{"base": base, "tuned": between}, {"base": base, "tuned": result}]
    assert (first / "mine" / "part-00000.jsonl").read_bytes() != (out / "mine" / "part-00000.jsonl").read_bytes()
    assert {record(folder / "score")["weights"] for folder in (first, out)} == {
        weights_fingerprint(asked.score.model if asked.score else "")
    }, "the teacher stays"
    assert not (first / "cache").exists()
    tensors = [load_file(path / "model.safetensors") for path in (tiny_model, first / "model", out / "model")]
    steps = [max(float((one[name] - other[name]).abs().max()) for name in one) for one, other in pairwise(tensors)]
    assert all(0 < step < 0.02 for step in steps), "a few small steps on, not a training of its own"


@pytest.mark.ray
@pytest.mark.slow
def test_report_and_experiment_are_of_all_rounds(asked: Experiment, done: list[str]) -> None:
    out = Path(asked.output_dir)
    report = (out / "report.html").read_text()
    assert 'href="rounds/1/mine/audit.html"' in report
    assert 'href="mine/audit.html"' in report
    assert (out / "rounds/1/mine/audit.html").is_file()
    assert load(str(out / "config.yaml")) == asked
    own = load(str(out / "rounds" / "1" / "config.yaml"))
    assert own.mine is not None
    assert own.mine.rounds == 1


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_rounds_again_do_nothing(asked: Experiment, done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(asked.output_dir)
    folders = [folder / name for folder in (out, out / "rounds" / "1") for name in JOBS]
    before = [folder.stat().st_ino for folder in folders]
    done.clear()
    monkeypatch.setattr("rayembed.jobs.train._fit", lambda *_: pytest.fail("it trains again"))
    run.run(asked)
    assert [folder.stat().st_ino for folder in folders] == before
    assert done == []
    assert load(str(out / "config.yaml")) == asked
    assert asked.mine is not None
    for rounds in (1, 3):
        with pytest.raises(ChangedError, match=rf"was made in 2 rounds, and mine\.rounds is {rounds}"):
            run.run(replace(asked, mine=replace(asked.mine, rounds=rounds)))
    assert [folder.stat().st_ino for folder in folders] == before
