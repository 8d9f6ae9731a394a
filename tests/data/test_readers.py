"""Every format gives the same records with their places; what is not a record is an error with its line."""

import json
import logging
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayembed.data import readers
from rayembed.data.problems import Report
from rayembed.data.readers import read_records

ROWS: list[dict[str, Any]] = [
    {"query": "é", "pos": ["a\nb"]},
    {"query": "b", "pos": ["c", "d"]},
    {"query": "c", "pos": ["e"]},
]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def read(path: str) -> tuple[list[tuple[int | None, dict[str, Any]]], list[str]]:
    """(line, value) of each record, and the errors without the folder."""
    report = Report()
    records = [(record.line, record.value) for record in read_records(path, report)]
    return records, [
        str(p).replace(str(Path(path).parent) + "/", "") for each in report.errors.kept.values() for p in each
    ]


def test_jsonl_counts_lines_and_blank_ones_have_no_row(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    records, errors = read(write(tmp_path / "a.jsonl", f"{lines[0]}\n\n{lines[1]}\r\n  \n{lines[2]}"))
    assert records == [(1, ROWS[0]), (3, ROWS[1]), (5, ROWS[2])]
    assert errors == []
    report = Report()
    assert len(list(read_records(str(tmp_path / "a.jsonl"), report))) == 3
    assert list(report.counts.values()) == [2]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_may_be_an_array(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps(ROWS, indent=indent)
    records, errors = read(write(tmp_path / "a.json", "\ufeff\n" + text))
    assert [value for _, value in records] == ROWS
    assert [line for line, _ in records] == ([2, 2, 2] if indent is None else [3, 9, 16])
    assert errors == []


def test_json_may_be_lines(tmp_path: Path) -> None:
    records, errors = read(write(tmp_path / "a.json", "\n".join(map(json.dumps, ROWS))))
    assert records == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2])]
    assert errors == []


@pytest.mark.parametrize("text", ["[]", "[ \n ]", ""])
def test_json_may_be_empty(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path / "a.json", text)) == ([], [])


def test_parquet_counts_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PARQUET_ROWS", 2)
    records, errors = read(write_parquet(tmp_path / "a.parquet", ROWS))
    assert records == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2])]
    assert errors == []


def test_bad_lines_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    lines = [
        b'{"query": "a"}',
        b"{query: 1}",
        b"[1]",
        b'"text"',
        b'{"query": "\xff"}',
        b'{"query": "b"}',
        b'{"a": 1} {"b": 2}',
    ]
    records, errors = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert records == [(1, {"query": "a"}), (6, {"query": "b"})]
    starts = [
        "a.jsonl:2: not JSON",
        "a.jsonl:5: not JSON",
        "a.jsonl:7: not JSON",
        "a.jsonl:3: found a list",
        "a.jsonl:4: found a text",
    ]
    assert len(errors) == len(starts)
    assert all(error.startswith(start) for error, start in zip(errors, starts, strict=True)), errors


@pytest.mark.parametrize(
    ("text", "line", "read_before"),
    [
        ('[\n{"a": 1},\n{"b" 2},\n{"c": 3}]', 3, 1),
        ('[\n{"a": 1}\n{"b": 2}]', 3, 1),
        ('[\n{"a": 1},\n', 3, 1),
        ('[\n{"a": 1},\n]', 3, 1),
        ('[\n{"a": 1}\n]\n{}', 3, 1),
        ('[\n{"a": 1},\n7]', 3, 1),
    ],
)
def test_a_broken_array_is_an_error_at_its_line(tmp_path: Path, text: str, line: int, read_before: int) -> None:
    records, errors = read(write(tmp_path / "a.json", text))
    assert len(records) == read_before
    assert len(errors) == 1
    assert errors[0].startswith(f"a.json:{line}: ")


def test_what_is_not_parquet_is_an_error_of_the_file(tmp_path: Path) -> None:
    records, errors = read(write(tmp_path / "a.parquet", "PAR1 no"))
    assert records == []
    assert len(errors) == 1
    assert errors[0].startswith("a.parquet: not readable as parquet")


@pytest.mark.parametrize("name", ["a.txt", "noending"])
def test_an_unknown_format_is_an_error_of_the_file(tmp_path: Path, name: str) -> None:
    records, errors = read(write(tmp_path / name, "{}"))
    assert records == []
    assert errors == [f"{name}: allowed are files ending in .jsonl, .json, .parquet"]


def test_progress_is_logged_every_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = count()
    monkeypatch.setattr("rayembed.data.readers.time.monotonic", lambda: float(next(seconds)))
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n' * 12)
    with caplog.at_level(logging.INFO, logger=readers.__name__):
        list(read_records(path, Report()))
    assert [r.getMessage().removeprefix(path) for r in caplog.records] == [": 5 rows, 1 rows/s", ": 10 rows, 1 rows/s"]
