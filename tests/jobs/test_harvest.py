"""The job harvest: reuse, refusal, replacement."""

import json
from pathlib import Path

import pytest

from rayembed.config import Experiment
from rayembed.jobs import harvest


def experiment(folder: Path, **changes: object) -> Experiment:
    section = {"output": str(folder), "packages": ["json", "wsgiref"]} | changes
    return Experiment(output_dir="unused", model={"name_or_path": "unused"}, harvest=section)  # type: ignore[arg-type]


def marked(folder: Path) -> Path:
    """A file that a new harvest would remove."""
    (folder / "mark").touch()
    return folder / "mark"


def test_the_same_settings_are_harvested_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert harvest.run(experiment(folder)) == folder
    mark = marked(folder)
    harvest.run(experiment(folder))
    assert mark.exists()


def test_other_settings_are_named_and_replaced_on_request_only(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    harvest.run(experiment(folder))
    mark = marked(folder)
    with pytest.raises(ValueError, match=r"settings\.max_pairs was None, is 5\. Use --overwrite"):
        harvest.run(experiment(folder, max_pairs=5))
    assert mark.exists()
    harvest.run(experiment(folder, max_pairs=5), overwrite=True)
    assert not mark.exists()
    assert len((folder / "corpus.jsonl").read_text().splitlines()) == 5


def test_another_version_of_a_package_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    harvest.run(experiment(folder))
    stats = json.loads((folder / "harvest.json").read_text())
    stats["fingerprint"]["versions"]["json"] = "0.0.1"
    (folder / "harvest.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match=r"versions\.json was 0\.0\.1, is 3\."):
        harvest.run(experiment(folder))


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds no harvest\.json.*another harvest\.output"):
        harvest.run(experiment(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_plan_says_what_would_happen(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    plan = harvest.plan(experiment(folder, max_pairs=5))
    assert "at most 5 pairs" in plan
    assert "does not exist yet" in plan
    assert not folder.exists()
    harvest.run(experiment(folder, max_pairs=5))
    assert harvest.plan(experiment(folder, max_pairs=5)).endswith("is up to date")
    with pytest.raises(ValueError, match=r"something else: settings\.max_pairs was 5, is None\. Use --overwrite"):
        harvest.plan(experiment(folder))
    assert harvest.plan(experiment(folder), overwrite=True).endswith("max_pairs was 5, is None: would be replaced")


def test_an_experiment_without_the_section_is_refused() -> None:
    without = Experiment(output_dir="unused", model={"name_or_path": "unused"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no section harvest"):
        harvest.run(without)
