"""Passages and queries: their forms, every error with its place, and one id for one text."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rayembed.data.passages import parse_passage, parse_query, read_texts
from rayembed.data.problems import Report
from rayembed.data.readers import Record
from rayembed.data.store import Row


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path, *values: object) -> tuple[list[Row], Report]:
    path.write_text("\n".join(map(json.dumps, values)))
    report = Report()
    return list(read_texts([str(path)], parse_passage, "passages", report)), report


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"_id": "1", "title": "Ti", "text": "te "}, {"id": "1", "text": "Ti te"}),
        ({"id": 1, "title": "", "text": "te"}, {"id": "1", "text": "te"}),
        ({"_id": "1", "title": None, "text": " te"}, {"id": "1", "text": "te"}),
        ({"_id": "1", "title": "Ti", "text": ""}, {"id": "1", "text": "Ti"}),
        ({"text": " te "}, {"id": "p" + sha("te"), "text": "te"}),
    ],
)
def test_forms_of_a_passage(value: dict[str, Any], expected: Row) -> None:
    report = Report()
    assert parse_passage(Record("c.jsonl", 3, value), report) == expected
    assert report.errors.total == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"_id": "1"}, "text: is missing or null"),
        ({"_id": "1", "texts": "a"}, "text: is missing or null; the nearest field here is 'texts'"),
        ({"_id": "1", "text": ["a"]}, "text: found a list, allowed: a text"),
        ({"_id": "1", "title": 2, "text": "a"}, "title: found a number, allowed: a text"),
        ({"_id": "1", "title": " ", "text": "\n"}, "text: the text is empty"),
        ({"_id": 1.5, "text": "a"}, "_id: found a number, allowed: a text or a whole number"),
        ({"id": "", "text": "a"}, "id: found an empty text"),
        ({"id": "\udc00", "text": "a"}, "id: the text holds half a character"),
    ],
)
def test_each_error_is_named_by_file_line_and_field(value: dict[str, Any], message: str) -> None:
    report = Report()
    assert parse_passage(Record("c.jsonl", 3, value), report) is None
    assert [line.startswith(f"c.jsonl:3: {message}") for line in report.errors.lines()] == [True]


def test_queries_keep_their_prompt() -> None:
    report = Report()
    assert parse_query(Record("q", 1, {"_id": "1", "text": "a ", "prompt": "Find: "}), report) == {
        "id": "1",
        "text": "a",
        "prompt": "Find: ",
    }
    assert parse_query(Record("q", 1, {"text": "a"}), report) == {"id": "q" + sha("a"), "text": "a", "prompt": None}
    assert report.errors.total == 0
    assert parse_query(Record("q", 2, {"_id": "1", "text": "", "prompt": 1}), report) is None
    assert parse_query(Record("q", 3, {"text": "a", "prompt": "\ud800"}), report) is None
    assert [line.split(": ")[:2] for line in report.errors.lines()] == [
        *(["q:2", "text"], ["q:2", "prompt"], ["q:3", "prompt"])
    ]


def test_repeated_passages_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows, report = read(path, {"id": "1", "text": "a"}, {"id": "2", "text": "b"}, {"id": "1", "text": " a "})
    assert [row["id"] for row in rows] == ["1", "2"]
    assert [p.line for p in report.warnings.kept["repeated passages, dropped"]] == [3]
    assert report.counts == {f"passages in {path}": 2}
    assert report.errors.total == 0


def test_an_id_of_two_texts_is_an_error(tmp_path: Path) -> None:
    _, report = read(tmp_path / "c.jsonl", {"id": "1", "text": "a"}, {"id": "1", "text": "b"}, {"id": "2", "text": "b"})
    assert next(report.errors.lines()).startswith(f"{tmp_path}/c.jsonl:2: id: '1' stood for another text before")


def test_equal_texts_of_two_ids_are_kept_and_counted(tmp_path: Path) -> None:
    rows, report = read(tmp_path / "c.jsonl", {"id": "1", "text": "a"}, {"id": "2", "text": "a"})
    assert [row["id"] for row in rows] == ["1", "2"]
    assert [p.line for p in report.warnings.kept["duplicate texts of passages"]] == [2]


def test_uniqueness_holds_over_files_and_beyond_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayembed.data.passages.BATCH", 2)
    for name in ("a", "b"):
        lines = [json.dumps({"id": f"{name}{i}", "text": f"{name}{i}"}) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, '{"id": "a0", "text": "a0"}']))
    report = Report()
    rows = list(read_texts([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], parse_passage, "passages", report))
    assert [row["id"] for row in rows] == [f"{name}{i}" for name in "ab" for i in range(5)]
    assert [str(p).split(": ")[0] for p in report.warnings.kept["repeated passages, dropped"]] == [
        f"{tmp_path}/a.jsonl:6",
        f"{tmp_path}/b.jsonl:6",
    ]
