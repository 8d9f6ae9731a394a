"""The report keeps 20 of each kind, counts the rest, and refuses the data in words that can be acted on."""

import pytest

from rayembed.data.problems import DataError, Problem, Report


def report_of(errors: int, warnings: int = 0) -> Report:
    report = Report()
    for line in range(1, errors + 1):
        report.error("empty pos", Problem("a.jsonl", line, "pos", "is empty"))
    for line in range(1, warnings + 1):
        report.warn("duplicate rows", Problem("a.jsonl", line, "query", "again"))
    return report


def test_keeps_twenty_of_a_kind_and_counts_the_rest() -> None:
    report = report_of(23)
    report.error("not JSON", Problem("b.jsonl", 7, "", "not JSON"))
    with pytest.raises(DataError) as caught:
        report.raise_if_errors()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("24 errors")
    assert lines[1] == "  a.jsonl:1: pos: is empty"
    assert lines[20:23] == ["  a.jsonl:20: pos: is empty", "  ... and 3 more: empty pos", "  b.jsonl:7: not JSON"]


def test_warnings_do_not_refuse_the_data() -> None:
    report_of(0, warnings=3).raise_if_errors()


def test_a_problem_of_a_whole_file_has_no_line() -> None:
    assert str(Problem("a.parquet", None, "", "not parquet")) == "a.parquet: not parquet"


def test_summary_has_counts_warnings_with_their_first_place_and_errors() -> None:
    report = report_of(1, warnings=30)
    report.count("rows", 12345)
    lines = report.summary().splitlines()
    assert any(line.split() == ["rows", "12,345"] for line in lines)
    assert any("duplicate rows" in line and " 30 " in line and "a.jsonl:1: query: again" in line for line in lines)
    assert "  a.jsonl:1: pos: is empty" in lines
    assert lines[-1] == "1 error, 30 warnings"


def test_json_gives_the_report_back() -> None:
    report = report_of(25, warnings=2)
    report.count("rows", 3)
    again = Report.from_json(report.to_json())
    assert again.summary() == report.summary()
    assert again.errors.total == 25


def test_merging_a_name_twice_counts_once_and_keeps_twenty() -> None:
    whole = report_of(15)
    part = report_of(10)
    part.count("rows", 4)
    whole.merge(part, "store")
    whole.merge(part, "store")
    assert whole.errors.counts == {"empty pos": 25}
    assert len(whole.errors.kept["empty pos"]) == 20
    assert whole.counts == {"rows": 4}
