"""What README.md says is true of this tree: its jobs, folders, files, test files and the experiment it shows."""

import re
from pathlib import Path

import pytest

from rayembed.cli import JOBS
from rayembed.config.loading import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_experiment_shown_loads(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(blocks("yaml")[0])
    experiment = load(str(path))
    assert experiment.train is not None
    assert experiment.train.learning_rate == 1e-5
    assert experiment.mine is not None


def test_the_table_of_jobs_is_the_command_s() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(JOBS)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|configs|rayembed)/[\w./*-]*)`", README))))
def test_the_paths_named_are_there(path: str) -> None:
    assert list(ROOT.glob(path.rstrip("/"))), f"README names {path}"


def test_the_tree_shown_is_the_tree() -> None:
    shown = set(re.findall(r"^      (\w+(?:\.py|/))  ", README, re.MULTILINE))
    package = ROOT / "rayembed"
    there = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()} | {"cli.py"}
    assert shown == there


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"\b[A-Z]+_SAYS\b|^FIGURES$|\b(?:QS|MQ)_[A-Z]+", README, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")))
def test_every_shipped_experiment_loads(name: str) -> None:
    load(str(ROOT / name))
