"""TREC run files: what is written is what is read, and what would break the columns is refused."""

from pathlib import Path

import pytest

from rayembed.evaluation.trec import read_run, write_run

RANKINGS = {"q2": [("z", 0.1 + 0.2), ("a", -1e-9)], "q1": [("a", 1.0)]}


def test_lines_are_what_trec_eval_reads(tmp_path: Path) -> None:
    write_run(tmp_path / "base.trec", RANKINGS, tag="base")
    lines = (tmp_path / "base.trec").read_text().splitlines()
    assert lines == ["q2 Q0 z 1 0.30000000000000004 base", "q2 Q0 a 2 -1e-09 base", "q1 Q0 a 1 1.0 base"]


def test_reading_gives_back_ids_scores_and_order_exactly(tmp_path: Path) -> None:
    write_run(tmp_path / "base.trec", RANKINGS, tag="base")
    assert read_run(tmp_path / "base.trec") == RANKINGS


def test_ranks_rule_over_the_order_of_lines(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("q Q0 b 10 0.5 t\nq Q0 a 9 0.5 t\n")
    assert read_run(tmp_path / "run") == {"q": [("a", 0.5), ("b", 0.5)]}


@pytest.mark.parametrize(
    "name", ["a b", "a\tb", "a\u00a0b\x1f", " a", "\n", "50%", "a%20b", "a%2520b", "% 20", "%%41", "%4 1", "é%C3 é"]
)
def test_ids_with_white_space_and_percent_signs_come_back(tmp_path: Path, name: str) -> None:
    rankings = {name: [("a", 1.0), (name, 0.5)]}
    write_run(tmp_path / "run", rankings, tag="base")
    lines = (tmp_path / "run").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [6, 6]
    assert read_run(tmp_path / "run") == rankings


def test_white_space_is_written_as_in_urls_and_other_ids_as_they_are(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"a b": [("50%/é:+", 1.0), ("100%25", 0.5)]}, tag="base")
    assert (tmp_path / "run").read_text() == "a%20b Q0 50%/é:+ 1 1.0 base\na%20b Q0 100%2525 2 0.5 base\n"


def test_ids_and_tags_that_are_no_word_are_refused_and_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_run(path, RANKINGS, tag="base")
    before = path.read_bytes()
    for rankings, tag in (
        ({"q": [("", 0.5)]}, "base"),
        ({"": [("a", 1.0)]}, "base"),
        ({"q": [("a", 1.0)]}, "the base"),
    ):
        with pytest.raises(ValueError, match="whitespace"):
            write_run(path, rankings, tag=tag)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_refuses_a_score_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="query 'q' and passage 'a' is nan"):
        write_run(tmp_path / "run", {"q": [("a", float("nan"))]}, tag="base")


@pytest.mark.parametrize("line", ["q Q0 a 1 0.5", "q Q0 a first 0.5 t", "q Q0 a 1 high t", ""])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "run").write_text(f"q Q0 z 7 0.5 t\n{line}\n")
    with pytest.raises(ValueError, match=r"run:2: found .*a run line is"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("line", ["q Q0 a 2 0.4 t", "q Q0 b 1 0.4 t"])
def test_a_passage_or_rank_given_twice_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "run").write_text(f"q Q0 a 1 0.5 t\n{line}\n")
    with pytest.raises(ValueError, match=r"run:2: query 'q' has .* twice"):
        read_run(tmp_path / "run")
