"""Qrels in their forms and with their errors, and the join of judgements with texts."""

from pathlib import Path

import pytest

from rayembed.data import beir
from rayembed.data.beir import BELOW_MIN_GRADE, Judgement, check_ids, read_qrels, training_rows
from rayembed.data.problems import Report
from rayembed.data.store import PASSAGES, QUERIES, Store, StoreWriter

EXPECTED = [("q1", "d1", 1), ("q1", "d2", 0), ("q2", "d1", 2)]


def read(path: Path, text: str) -> tuple[list[Judgement], Report]:
    path.write_text(text)
    report = Report()
    return read_qrels(str(path), report), report


def store(folder: Path, rows: dict[str, str], *, queries: bool = False) -> Store:
    writer = StoreWriter(folder, QUERIES if queries else PASSAGES, 2)
    for name, text in rows.items():
        writer.add({"id": name, "text": text} | ({"prompt": "p"} if queries else {}))
    return writer.finish()


@pytest.mark.parametrize(
    ("text", "first_line"),
    [
        ("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td1\t2\n", 2),
        ("q1\td1\t1\nq1\td2\t0\n\nq2\td1\t2.0", 1),
        ("q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 2\n", 1),
        ("\ufeffq1\tQ0\td1\t1\r\nq1\tQ0\td2\t0\r\nq2\tQ0\td1\t2\r\n", 1),
    ],
)
def test_forms_of_qrels(tmp_path: Path, text: str, first_line: int) -> None:
    judgements, report = read(tmp_path / "test.tsv", text)
    assert [(j.query_id, j.passage_id, j.score) for j in judgements] == EXPECTED
    assert judgements[0].line == first_line
    assert report.errors.total == report.warnings.total == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q9\td9", ": found 2 columns, allowed: query-id, corpus-id, score"),
        ("q9\t\t1", ": found 3 columns, allowed:"),
        ("a b c d e", ": found 5 columns, allowed:"),
        ("q9\td9\thigh", " score: found 'high', allowed: a whole number"),
        ("q9\td9\t0.5", " score: found '0.5', allowed: a whole number"),
        ("q9\td9\tnan", " score: found 'nan', allowed: a whole number"),
        ("q1\td1\t2", " score: query and passage were judged in line 1 already"),
    ],
)
def test_each_error_is_named_by_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    judgements, report = read(tmp_path / "test.tsv", f"q1\td1\t1\n{line}\nq2\td2\t1\n")
    assert [j.query_id for j in judgements] == ["q1", "q2"]
    errors = list(report.errors.lines())
    assert len(errors) == 1
    assert errors[0].startswith(f"{tmp_path}/test.tsv:2:{message.removeprefix(':')}")


def test_a_repeated_judgement_is_dropped_and_counted(tmp_path: Path) -> None:
    judgements, report = read(tmp_path / "test.tsv", "q1\td1\t1\nq1\td1\t1\n")
    assert len(judgements) == 1
    assert [p.line for p in report.warnings.kept["repeated judgements, dropped"]] == [2]


def test_qrels_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    report = Report()
    assert read_qrels(str(tmp_path / "dev.tsv"), report) == []
    assert next(report.errors.lines()).startswith(f"{tmp_path}/dev.tsv: there is no such file")


def test_ids_without_text_are_errors_at_their_first_line(tmp_path: Path) -> None:
    corpus = store(tmp_path / "c", {"d1": "a"})
    queries = store(tmp_path / "q", {"q1": "b"}, queries=True)
    path = tmp_path / "test.tsv"
    judgements, report = read(path, "q1\td1\t1\nq1\tx\t1\nz\td1\t1\nz\tx\t0\n")
    check_ids(judgements, str(path), corpus=corpus, queries=queries, corpus_file="c.jsonl", report=report)
    assert list(report.errors.lines()) == [
        f"{path}:2: corpus-id: 'x' is not in c.jsonl",
        f"{path}:3: query-id: 'z' is not in queries.jsonl",
    ]


def test_rows_are_joined_in_the_order_of_the_qrels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beir, "QUERIES_AT_A_TIME", 2)
    corpus = store(tmp_path / "c", {"d1": "one", "d2": "two", "d3": "three"})
    queries = store(tmp_path / "q", {"q1": "a", "q2": "b", "q3": "c", "q4": "d"}, queries=True)
    path = tmp_path / "train.tsv"
    judgements, report = read(
        path, "q3\td3\t1\nq1\td2\t1\nq4\td1\t0\nq3\td1\t2\nq2\td2\t1\nq2\td1\t-1\nq1\tx\t1\ny\td1\t1\n"
    )
    found = list(
        training_rows(judgements, str(path), dataset="set", corpus=corpus, queries=queries, min_grade=1, report=report)
    )
    rows = [(row["query_id"], row["query"], row["pos"], row["pos_ids"]) for _, row in found]
    assert rows == [
        ("q3", "c", ["three", "one"], ["d3", "d1"]),
        ("q1", "a", ["two"], ["d2"]),
        ("q2", "b", ["two"], ["d2"]),
    ]
    assert [record.line for record, _ in found] == [1, 2, 5]
    assert all(row["prompt"] == "p" and row["dataset"] == "set" and row["neg"] == [] for _, row in found)
    assert all(row["related_ids"] is None for _, row in found)
    assert report.counts["queries without a positive"] == 1
    assert BELOW_MIN_GRADE not in report.counts


@pytest.mark.parametrize(
    ("min_grade", "expected"),
    [
        (1, {"q1": (["d1", "d2", "d3"], None), "q2": (["d3"], None), "q3": (["d1"], None)}),
        (2, {"q1": (["d2", "d3"], ["d1"]), "q3": (["d1"], None)}),
        (3, {"q1": (["d3"], ["d1", "d2", "absent"])}),
        (4, {}),
    ],
)
def test_judgements_below_the_least_grade_are_related(
    tmp_path: Path, min_grade: int, expected: dict[str, tuple[list[str], list[str] | None]]
) -> None:
    corpus = store(tmp_path / "c", {f"d{i}": f"text {i}" for i in range(6)})
    queries = store(tmp_path / "q", {f"q{i}": f"query {i}" for i in range(4)}, queries=True)
    lines = ["q1 0 d1 1", "q1 0 d2 2", "q1 0 d3 3", "q1 0 absent 2", "q1 0 d4 0", "q1 0 d5 -1", "q2 0 d3 1"]
    judgements, report = read(tmp_path / "train.tsv", "\n".join([*lines, "q3 0 d1 2"]))
    rows = training_rows(
        judgements, "train.tsv", dataset="s", corpus=corpus, queries=queries, min_grade=min_grade, report=report
    )
    assert {row["query_id"]: (row["pos_ids"], row["related_ids"]) for _, row in rows} == expected
    assert report.counts["queries without a positive"] == 3 - len(expected)
    assert report.counts.get(BELOW_MIN_GRADE, 0) == {1: 0, 2: 2, 3: 5, 4: 6}[min_grade]
