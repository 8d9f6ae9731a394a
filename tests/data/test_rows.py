"""Both forms of training rows, every error with its line and field, and what is noted over all rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rayembed.data.problems import Report
from rayembed.data.readers import Record, read_records
from rayembed.data.rows import parse_row, survey

GOOD = {"query": "what", "pos": ["yes"], "neg": ["no", "never"]}


def sha(letter: str, text: str) -> str:
    return letter + hashlib.sha256(text.encode()).hexdigest()[:16]


def parsed(value: dict[str, Any]) -> tuple[Any, Report]:
    report = Report()
    return parse_row(Record("a.jsonl", 7, value), report), report


def surveyed(*values: dict[str, Any]) -> Report:
    report = Report()
    records = [Record("a.jsonl", i, value) for i, value in enumerate(values, 1)]
    rows = [(record, parse_row(record, report)) for record in records]
    assert len(list(survey([(record, row) for record, row in rows if row is not None], report))) == len(values)
    return report


def test_flag_embedding_row_with_all_columns() -> None:
    value = GOOD | {
        "query_id": 12,
        "pos_ids": ["1"],
        "neg_ids": ["2", 3],
        "pos_scores": [1],
        "neg_scores": [-0.5, 2.0],
        "prompt": " Find: ",
        "type": "normal",
        "dataset": "mine",
        "related_ids": [4, "5"],
    }
    row, report = parsed(value)
    assert row == value | {"query_id": "12", "neg_ids": ["2", "3"], "related_ids": ["4", "5"]}
    assert isinstance(row["pos_scores"][0], float)
    assert report.warnings.total == 0


def test_ids_come_from_the_texts_and_the_dataset_is_the_file() -> None:
    row, _ = parsed({"query": " what\n", "pos": [" yes "]})
    assert row["query"] == "what"
    assert row["query_id"] == sha("q", "what")
    assert row["pos"] == ["yes"]
    assert row["pos_ids"] == [sha("p", "yes")]
    assert (row["neg"], row["neg_ids"], row["neg_scores"], row["dataset"]) == ([], [], None, "a.jsonl")
    assert row["related_ids"] is None


def test_positive_scores_alone_are_complete_where_there_are_no_negatives() -> None:
    row, _ = parsed({"query": "q", "pos": ["p"], "pos_scores": [3.0]})
    assert row["neg_scores"] == []


@pytest.mark.parametrize("negative", [None, "no"])
def test_triplets(negative: str | None) -> None:
    row, report = parsed({"query": "what", "positive": "yes", "negative": negative})
    assert (row["pos"], row["neg"]) == (["yes"], [negative] if negative else [])
    assert report.errors.total == 0


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": None}, "no query", "query: is missing or null"),
        ({"query": 3}, "query is not text", "query: found a number, allowed: a text"),
        ({"query": " \n"}, "query is empty", "query: the text is empty"),
        ({"query": "\ud800"}, "query is not text", "query: the text holds half a character"),
        ({"pos": None}, "no pos", "pos: is missing or null"),
        ({"pos": []}, "no pos", "pos: is empty; allowed: at least one passage"),
        ({"pos": "yes"}, "pos is not a list", "pos: found a text, allowed: a list of texts"),
        ({"pos": ["yes", None]}, "pos is not text", "pos[1]: found null, allowed: a text"),
        ({"pos": ["yes", ""]}, "pos is empty", "pos[1]: the text is empty"),
        ({"neg": "no"}, "neg is not a list", "neg: found a text, allowed: a list"),
        ({"neg": {"a": 1}}, "neg is not a list", "neg: found an object, allowed: a list"),
        ({"neg": ["no", ["never"]]}, "neg is not text", "neg[1]: found a list, allowed: a text"),
        ({"neg": ["\t", "no"]}, "neg is empty", "neg[0]: the text is empty"),
        (
            {"pos_scores": [1.0, 2.0]},
            "pos_scores has the wrong length",
            "pos_scores: found 2 scores, allowed: a list of 1",
        ),
        ({"neg_scores": [1.0]}, "neg_scores has the wrong length", "neg_scores: found 1 scores, allowed: a list of 2"),
        ({"neg_scores": 1.0}, "neg_scores has the wrong length", "neg_scores: found a number"),
        ({"neg_scores": [1.0, "2"]}, "neg_scores is not a number", "neg_scores[1]: found '2'"),
        ({"neg_scores": [1.0, True]}, "neg_scores is not a number", "neg_scores[1]: found True"),
        ({"neg_scores": [float("nan"), 1.0]}, "neg_scores is not a number", "neg_scores[0]: found nan"),
        ({"pos_scores": [float("inf")]}, "pos_scores is not a number", "pos_scores[0]: found inf"),
        ({"pos_ids": ["1", "2"]}, "pos_ids does not fit", "pos_ids: found 2 ids, allowed: a list of 1"),
        ({"neg_ids": ["1", 2.5]}, "ids are wrong", "neg_ids[1]: found a number"),
        ({"related_ids": "1"}, "related_ids is not a list", "related_ids: found a text, allowed: a list of ids"),
        ({"related_ids": ["1", None]}, "ids are wrong", "related_ids[1]: found null"),
        ({"query_id": ""}, "ids are wrong", "query_id: found an empty text"),
        ({"prompt": 3}, "prompt is not text", "prompt: found a number"),
        ({"prompt": "\ud800"}, "prompt is not text", "prompt: the text holds half a character"),
        ({"type": "\ud800"}, "type is not text", "type: the text holds half a character"),
        ({"query_id": "a\ud800"}, "id is not text", "query_id: the text holds half a character"),
        ({"neg_ids": ["1", "\ud800"]}, "id is not text", "neg_ids[1]: the text holds half a character"),
        ({"type": []}, "type is not text", "type: found a list"),
        ({"dataset": 1}, "dataset is not text", "dataset: found a number"),
        ({"neg": ["no", " yes "]}, "passage is both pos and neg", "neg[1]: 'yes' is also a positive"),
        (
            {"pos_ids": ["1"], "neg_ids": ["2", "1"]},
            "passage is both pos and neg",
            "neg[1]: 'never' is also a positive",
        ),
        ({"positive": "yes"}, "two forms in one row", "pos: found positive and pos in one row"),
    ],
)
def test_each_error_is_named_by_file_line_and_field(change: dict[str, Any], kind: str, message: str) -> None:
    row, report = parsed(GOOD | change)
    assert row is None
    assert report.errors.counts == {kind: 1}
    assert str(report.errors.kept[kind][0]).startswith(f"a.jsonl:7: {message}")


@pytest.mark.parametrize("change", [{"positive": 3}, {"positive": ["yes"]}, {"positive": "yes", "negative": ["no"]}])
def test_triplets_hold_texts(change: dict[str, Any]) -> None:
    row, report = parsed({"query": "what"} | change)
    assert row is None
    assert report.errors.total == 1
    assert "allowed: a text" in next(report.errors.lines())


def test_all_errors_of_a_row_are_told() -> None:
    _, report = parsed({"pos": [], "neg": 1, "pos_scores": [1.0]})
    assert set(report.errors.counts) == {"no query", "no pos", "neg is not a list", "pos_scores has the wrong length"}


def test_a_missing_field_names_the_nearest_one_there_is() -> None:
    _, report = parsed({"querry": "what", "pos": ["yes"]})
    assert "the nearest field here is 'querry'" in next(report.errors.lines())


def test_columns_that_are_not_read_are_counted_with_the_nearest_known_one() -> None:
    report = surveyed(GOOD | {"query": "a", "negs": []}, GOOD | {"query": "b", "negs": [], "zzz": 1})
    assert report.warnings.counts["column 'negs' is not read"] == 2
    assert str(report.warnings.kept["column 'negs' is not read"][0]).endswith("did you mean 'neg'?")
    assert str(report.warnings.kept["column 'zzz' is not read"][0]) == "a.jsonl:2: zzz: this column is not read"
    assert report.errors.total == 0


def test_duplicates_are_noted_with_their_line() -> None:
    report = surveyed(
        {"query": "a", "pos": ["x", "y"]},
        {"query": "b", "pos": ["x", "y"]},
        {"query": "a", "pos": ["y", "x"]},
        {"query": "a", "pos": ["z"]},
    )
    assert [p.line for p in report.warnings.kept["duplicate rows"]] == [3]
    assert [p.line for p in report.warnings.kept["same query in several rows"]] == [4]
    assert report.counts["rows"] == 4
    assert report.counts["positives"] == 7


def test_one_query_id_stands_for_one_query() -> None:
    report = surveyed(
        {"query_id": "1", "query": "a", "pos": ["x"]},
        {"query_id": "1", "query": "a", "pos": ["y"]},
        {"query_id": "1", "query": "b", "pos": ["z"]},
    )
    assert [p.line for p in report.errors.kept["query_id of two queries"]] == [3]


def test_a_query_id_need_be_unique_within_a_dataset_alone() -> None:
    values = [("x", "1", "a"), ("y", "1", "b"), ("y", "1", "b"), ("y", "2", "a"), ("x", "2", "c"), ("y", "1", "d")]
    report = Report()
    rows = []
    for line, (dataset, name, query) in enumerate(values, 1):
        record = Record("a.jsonl", line, {"dataset": dataset, "query_id": name, "query": query, "pos": ["p"]})
        rows.append((record, parse_row(record, report) or {}))
    assert [row["query_id"] for row in survey(rows, report)][:5] == ["1", "y:1", "y:1", "2", "x:2"]
    assert [p.line for p in report.errors.kept["query_id of two queries"]] == [6]
    assert [p.line for p in report.warnings.kept["query ids of two datasets, renamed"]] == [2, 3, 5]


def test_a_column_name_that_cannot_be_written_is_shown_escaped() -> None:
    report = surveyed(GOOD | {"\ud800": 1})
    assert report.summary().encode()


def test_rows_without_negatives_scores_or_prompt_are_noted() -> None:
    scored = {"pos_scores": [1.0], "neg_scores": [0.0, 0.5], "prompt": "p"}
    report = surveyed(
        GOOD | scored | {"query": "a"},
        GOOD | {"query": "b", "pos_scores": [1.0]},
        {"query": "c", "pos": ["x"]} | {"pos_scores": [1.0]},
    )
    lines = {kind: [p.line for p in problems] for kind, problems in report.warnings.kept.items()}
    assert lines == {"rows without scores": [2], "rows without prompt": [2, 3], "rows without negatives": [3]}


def test_what_no_row_has_is_counted_and_no_warning() -> None:
    report = surveyed(GOOD | {"query": "a"}, GOOD | {"query": "b"})
    assert report.warnings.counts == {}
    assert report.counts["rows without scores"] == report.counts["rows without prompt"] == 2


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", "{", json.dumps({"query": "x", "pos": []}), json.dumps(GOOD)]))
    report = Report()
    rows = [parse_row(record, report) for record in read_records(str(path), report)]
    assert [row is None for row in rows] == [False, True, False]
    assert [line.split(": ")[0] for line in report.errors.lines()] == [f"{path}:3", f"{path}:4"]
