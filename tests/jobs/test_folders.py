"""A job's folder is written once, resumed when half done, and refused when it was made from something else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayembed.config import Experiment
from rayembed.config.loading import load
from rayembed.config.model import ModelConfig
from rayembed.jobs.folders import LAYOUT, RECORD, ChangedError, state, written_once

READS = {"weights": "abc", "train": {"learning_rate": 1e-5, "group": 8}, "files": ["a", "b"]}
OTHER = {"weights": "abc", "train": {"learning_rate": 2e-5, "margin": 1}, "files": ["a"]}


def writer(text: str = "first") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "result.txt").write_text(text)

    return write


def failing(folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    raise RuntimeError("killed")


def never(folder: Path) -> None:
    raise AssertionError("must not run")


def test_the_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "run" / "mine"

    def write(folder: Path) -> None:
        assert not final.exists()
        assert json.loads((folder / RECORD).read_text()) == {**READS, LAYOUT: []}
        writer()(folder)

    assert written_once(final, READS, write, overwrite=False) == final
    assert sorted(path.name for path in final.iterdir()) == [RECORD, "result.txt"]
    assert [path.name for path in final.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_up_to_date_is_reused(tmp_path: Path, overwrite: bool) -> None:
    written_once(tmp_path / "mine", READS, writer(), overwrite=False)
    reordered = dict(reversed(READS.items()))
    written_once(tmp_path / "mine", reordered, never, overwrite=overwrite)
    assert (tmp_path / "mine" / "result.txt").read_text() == "first"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_left_half_done_is_resumed(tmp_path: Path, overwrite: bool) -> None:
    final = tmp_path / "mine"
    with pytest.raises(RuntimeError, match="killed"):
        written_once(final, READS, failing, overwrite=False)
    assert not final.exists()
    assert (tmp_path / "mine.partial" / "half.txt").is_file()
    written_once(final, READS, writer(), overwrite=overwrite)
    assert (final / "half.txt").is_file()
    assert not (tmp_path / "mine.partial").exists()


def make_whole(final: Path) -> None:
    written_once(final, READS, writer(), overwrite=False)


def make_half(final: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        written_once(final, READS, failing, overwrite=False)


@pytest.mark.parametrize("make", [make_whole, make_half])
def test_changes_are_refused_with_their_dotted_keys(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "mine")
    with pytest.raises(ChangedError) as caught:
        written_once(tmp_path / "mine", OTHER, never, overwrite=False)
    message = str(caught.value)
    assert message.splitlines()[1:-1] == [
        "  files: was ['a', 'b'], is ['a']",
        "  train.group: was 8, is absent",
        "  train.learning_rate: was 1e-05, is 2e-05",
        "  train.margin: was absent, is 1",
    ]
    assert "mine" in message.splitlines()[0]
    assert "Use --overwrite to replace it, another output_dir" in message
    assert "weights" not in message


@pytest.mark.parametrize("make", [make_whole, make_half])
def test_overwrite_replaces_what_was_made_from_something_else(tmp_path: Path, make: Callable[[Path], None]) -> None:
    final = tmp_path / "mine"
    make(final)
    written_once(final, OTHER, writer("second"), overwrite=True)
    assert sorted(path.name for path in final.iterdir()) == [RECORD, "result.txt"]
    assert (final / "result.txt").read_text() == "second"
    assert json.loads((final / RECORD).read_text()) == {**OTHER, LAYOUT: []}


def test_a_folder_that_no_job_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ChangedError, match=r"has no job\.json"):
        written_once(tmp_path / "mine", READS, never, overwrite=False)
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_run_killed_before_its_first_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / ".job.json.77").write_text("{")
    assert state(tmp_path / "mine", READS, overwrite=False) == "would be written"
    written_once(tmp_path / "mine", READS, writer(), overwrite=False)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [RECORD, "result.txt"]


def test_the_state_in_words(tmp_path: Path) -> None:
    final = tmp_path / "mine"
    assert state(final, READS, overwrite=False) == "would be written"
    make_half(final)
    assert state(final, READS, overwrite=True) == "was left half done and would be resumed"
    assert state(final, OTHER, overwrite=True) == "was made from other settings and would be replaced"
    make_whole(final)
    assert state(final, READS, overwrite=True) == "is up to date"
    assert state(final, OTHER, overwrite=True) == "was made from other settings and would be replaced"


@pytest.mark.parametrize("make", [make_whole, make_half])
def test_a_dry_run_refuses_what_the_job_would_in_the_same_words(tmp_path: Path, make: Callable[[Path], None]) -> None:
    def advice(message: str) -> str:
        return ". Set the margin back" if "margin: was absent" in message else ""

    final = tmp_path / "mine"
    make(final)
    with pytest.raises(ChangedError, match="Set the margin back") as job:
        written_once(final, OTHER, never, overwrite=False, advice=advice)
    with pytest.raises(ChangedError) as dry:
        state(final, OTHER, overwrite=False, advice=advice)
    assert str(dry.value) == str(job.value)


def test_a_dry_run_sees_an_unfinished_folder_beside_a_finished_one(tmp_path: Path) -> None:
    final = tmp_path / "mine"
    make_whole(final)
    final.rename(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="killed"):
        written_once(final, OTHER, failing, overwrite=False)
    (tmp_path / "kept").rename(final)
    for refused in (
        lambda: written_once(final, READS, never, overwrite=False),
        lambda: state(final, READS, overwrite=False),
    ):
        with pytest.raises(ChangedError, match=r"mine\.partial was made from something else"):
            refused()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (make_whole, "is up to date if its files stay as they were"),
        (make_half, "was left half done and would be resumed if its files stay as they were"),
    ],
)
def test_what_jobs_before_may_change_is_not_compared(
    tmp_path: Path, make: Callable[[Path], None], expected: str
) -> None:
    make(tmp_path / "mine")
    others = {**READS, "files": ["c"]}
    assert state(tmp_path / "mine", others, overwrite=False, coming=["files"]) == expected
    with pytest.raises(ChangedError, match=r"train\.group: was 8") as raised:
        state(tmp_path / "mine", OTHER, overwrite=False, coming=["files"])
    assert "files: was" not in str(raised.value)


def test_unfinished_units_of_another_size_are_begun_anew(tmp_path: Path) -> None:
    final = tmp_path / "mine"
    with pytest.raises(RuntimeError, match="killed"):
        written_once(final, READS, failing, overwrite=False, layout=[2, 2])
    written_once(final, READS, writer(), overwrite=False, layout=[4])
    assert not (final / "half.txt").exists()
    written_once(final, READS, never, overwrite=False, layout=[1, 1, 1, 1])  # finished: the cut no longer matters


def test_config_yaml_is_of_what_was_made(tmp_path: Path) -> None:
    made, refused = (
        Experiment(output_dir=str(tmp_path), seed=seed, model=ModelConfig(name_or_path="a")) for seed in (1, 2)
    )
    written_once(tmp_path / "mine", READS, writer(), overwrite=False, experiment=made)
    with pytest.raises(ChangedError):
        written_once(tmp_path / "mine", OTHER, never, overwrite=False, experiment=refused)
    assert load(str(tmp_path / "config.yaml")) == made
