"""Paths that a node of the cluster does not see are refused, by node, setting and path, before work is shipped."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.config.model import ModelConfig
from rayembed.config.score import ScoreConfig
from rayembed.jobs import shared_paths
from rayembed.jobs.shared_paths import (
    NotSharedError,
    check_shared,
    read_paths,
    unseen,
    warn_of_job_copies,
    written_folders,
)

NODES = [
    {"NodeID": name, "NodeManagerHostname": name, "NodeManagerAddress": f"10.0.0.{i}"} for i, name in enumerate("bc")
]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for name in ("model", "teacher", "vectors"):
        (tmp_path / name).mkdir()
    (tmp_path / "vectors" / "part-0.npy").touch()
    return Experiment(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(name_or_path=str(tmp_path / "model")),
        score=ScoreConfig(model=str(tmp_path / "teacher")),
        mine=MineConfig(model="hub/id", corpus_embeddings=[str(tmp_path / "vectors"), "s3://bucket/x.npy"]),
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Two other nodes in the place of Ray's, of which c sees nothing below a folder `blind`; the paths they got."""
    seen: list[dict[str, str]] = []

    def ask(nodes: Sequence[dict[str, Any]], paths: Mapping[str, str]) -> dict[str, list[str]]:
        seen.append(dict(paths))
        there = {name: {key: path for key, path in paths.items()} for name in "bc"}
        there["c"] = {key: path + "-hidden" * ("blind" in path) for key, path in paths.items()}
        answers = {node["NodeID"]: unseen(there[node["NodeID"]], 0) for node in nodes}
        return {f"{name} (10.0.0.1)": missing for name, missing in answers.items() if missing}

    monkeypatch.setattr(shared_paths, "_others", lambda _: NODES)
    monkeypatch.setattr(shared_paths, "_asked", ask)
    return seen


def test_what_workers_write_and_read(experiment: Experiment, tmp_path: Path) -> None:
    assert written_folders(experiment) == {"output_dir": str(tmp_path / "run")}
    apart = replace(experiment, cache_dir=str(tmp_path / "runs-cache"))
    assert written_folders(apart) == {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "runs-cache")}
    assert read_paths(experiment) == {
        "model.name_or_path": str(tmp_path / "model"),
        "score.model": str(tmp_path / "teacher"),
        "mine.corpus_embeddings": str(tmp_path / "vectors" / "part-0.npy"),
    }


def test_shared_paths_are_tried_once_and_nothing_is_left(
    experiment: Experiment, asked: list[dict[str, str]], tmp_path: Path
) -> None:
    check_shared(experiment)
    check_shared(experiment)
    assert len(asked) == 1
    assert Path(asked[0]["output_dir"]).parent == tmp_path / "run"
    assert asked[0]["model.name_or_path"] == str(tmp_path / "model")
    assert [*(tmp_path / "run").iterdir()] == []
    check_shared(replace(experiment, cache_dir=str(tmp_path / "cache")))
    assert len(asked) == 2


def test_the_refusal_names_node_setting_path_and_what_to_do(
    experiment: Experiment, asked: list[dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "blind").mkdir()
    for _ in range(2):  # what was refused is tried again
        with pytest.raises(NotSharedError) as refused:
            check_shared(replace(experiment, cache_dir=str(tmp_path / "blind" / "cache")))
    assert len(asked) == 2
    told = str(refused.value)
    assert f"cache_dir {tmp_path}/blind/cache: what is written here is not seen on c (10.0.0.1)" in told
    assert "output_dir" not in told
    assert "NFS" in told
    assert [*(tmp_path / "blind" / "cache").iterdir()] == []
    model = tmp_path / "blind" / "model"
    model.mkdir()
    with pytest.raises(NotSharedError, match=rf"model.name_or_path {model}: is not there on c "):
        check_shared(replace(experiment, model=ModelConfig(name_or_path=str(model))))


def test_a_file_that_a_network_file_system_shows_late_is_waited_for(tmp_path: Path) -> None:
    late = tmp_path / "late"
    threading.Timer(0.6, late.touch).start()
    assert unseen({"here": str(tmp_path), "late": str(late), "never": str(tmp_path / "never")}, 2) == ["never"]


def test_a_run_folder_in_the_copy_that_ray_made_for_a_job_is_told_once(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    warn_of_job_copies(experiment)
    assert not caplog.messages
    for _ in range(2):
        warn_of_job_copies(replace(experiment, output_dir=str(copy / "runs" / "x")))
    (message,) = caplog.messages
    assert message.startswith(f"output_dir is {copy / 'runs' / 'x'}, in the copy that Ray made of --working-dir")
