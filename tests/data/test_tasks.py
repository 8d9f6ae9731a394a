"""Scored pairs and labelled texts as training rows, types, and one format a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayembed.data.fields import passage_id, query_id
from rayembed.data.prepare import corpus_of_rows, prepare_rows
from rayembed.data.problems import Report
from rayembed.data.readers import Record
from rayembed.data.rows import parse_row, parse_rows, survey
from rayembed.data.store import ROWS as SCHEMA
from rayembed.data.tasks import form_of

PAIR = {"sentence1": " a cat ", "sentence2": "a feline", "score": 1}
TEXT = {"text": "great film", "label": "good"}


def parsed(value: dict[str, Any]) -> tuple[Any, Report]:
    report = Report()
    return parse_row(Record("a.jsonl", 7, value), report, dataset="d"), report


def several(*values: dict[str, Any]) -> tuple[list[Any], Report]:
    report = Report()
    records = [Record("a.jsonl", i, value) for i, value in enumerate(values, 1)]
    return list(survey(parse_rows(records, report, dataset="d"), report)), report


def test_a_scored_pair_is_a_row_with_one_scored_positive() -> None:
    row, report = parsed(PAIR | {"prompt": "p: "})
    assert report.errors.total == report.warnings.total == 0
    assert row == {
        "query_id": query_id("a cat"),
        "query": "a cat",
        "prompt": "p: ",
        "dataset": "d",
        "type": "sts",
        "related_ids": None,
        "pos": ["a feline"],
        "pos_ids": [passage_id("a feline")],
        "pos_scores": [1.0],
        "neg": [],
        "neg_ids": [],
        "neg_scores": [],
    }


@pytest.mark.parametrize(("label", "expected"), [("good", "good"), (0, "0"), (12, "12")])
def test_a_labelled_text_is_a_row_without_passages(label: object, expected: str) -> None:
    row, report = parsed(TEXT | {"label": label})
    assert report.errors.total == report.warnings.total == 0
    assert (row["query"], row["label"], row["type"]) == ("great film", expected, "class")
    assert row["pos"] == row["neg"] == row["pos_ids"] == row["neg_ids"] == []


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"query": "q", "pos": ["p"], "label": "x"}, "retrieval"),
        ({"query": "q", "positive": "p", "sentence1": None, "text": None}, "retrieval"),
        ({"sentence1": "a"}, "sts"),
        ({"sentence2": "a", "score": 1}, "sts"),
        ({"text": "a", "label": 1}, "class"),
        ({"label": 1}, "class"),
        ({"score": 3}, "sts"),
        ({}, "retrieval"),
    ],
)
def test_the_fields_tell_the_format(value: dict[str, Any], form: str) -> None:
    assert form_of(Record("a", 1, value)) == form


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (PAIR | {"sentence1": None}, "sentence1: is missing or null; the nearest field here is 'sentence2'"),
        (PAIR | {"sentence2": 3}, "sentence2: found a number, allowed: a text"),
        (PAIR | {"score": None}, "score: is missing or null"),
        (PAIR | {"score": "1"}, "score: found '1', allowed: a finite number"),
        (PAIR | {"score": True}, "score: found True, allowed: a finite number"),
        (PAIR | {"score": float("nan")}, "score: found nan, allowed: a finite number"),
        (PAIR | {"type": "class"}, "type: found 'class', allowed: sts"),
        (TEXT | {"label": None}, "label: is missing or null"),
        (TEXT | {"label": 0.5}, "label: found a number, allowed: a text or a whole number"),
        (TEXT | {"text": " "}, "text: the text is empty"),
        (
            {"query": "q", "pos": ["p"], "type": "symetric_sts"},
            "type: found 'symetric_sts', allowed: normal, only_1neg",
        ),
        ({"query": "q", "pos": ["p"], "type": "sts"}, "type: is sts; allowed: one positive with its score"),
        ({"query": "q", "pos": ["p", "r"], "pos_scores": [1, 2], "type": "sts"}, "type: is sts; allowed: one positive"),
        ({"query": "q", "pos": ["p"], "pos_scores": [1], "neg": ["n"], "type": "sts"}, "type: is sts; allowed"),
        ({"query": "q", "pos": [], "type": "class"}, "label: is missing or null"),
        ({"query": "q", "pos": ["p"], "label": "x", "type": "class"}, "type: is class; allowed: a label, and neither"),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(value: dict[str, Any], line: str) -> None:
    row, report = parsed(value)
    assert row is None
    assert report.errors.total == 1
    assert next(report.errors.lines()).startswith(f"a.jsonl:7: {line}")


def test_the_nearest_type_is_named() -> None:
    _, report = parsed({"query": "q", "pos": ["p"], "type": "symetric_sts"})
    assert next(report.errors.lines()).endswith("did you mean 'symmetric_sts'?")


@pytest.mark.parametrize("kind", ["normal", "only_1neg", "symmetric_class", "symmetric_clustering", "symmetric_sts"])
def test_flag_embeddings_types_stay(kind: str) -> None:
    row, _ = parsed({"query": "q", "pos": ["p"], "type": kind})
    assert row["type"] == kind


@pytest.mark.parametrize("value", [PAIR, TEXT])
def test_what_a_job_writes_of_a_row_is_read_back(value: dict[str, Any]) -> None:
    row, _ = parsed(value)
    back, report = parsed({name: item for name, item in row.items() if item is not None})
    assert report.errors.total == report.warnings.total == 0
    assert {name: back.get(name) for name in SCHEMA.names} == {name: row.get(name) for name in SCHEMA.names}


def test_one_format_a_file() -> None:
    rows, report = several(PAIR, TEXT, PAIR | {"sentence1": "b"}, {"query": "q", "pos": ["p"]})
    assert [row["query"] for row in rows] == ["a cat", "b"]
    assert list(report.errors.lines()) == [
        "a.jsonl:2: text: is of format class, and the first record of this file is of sts; allowed: one format a file",
        "a.jsonl:4: query: is of format retrieval, and the first record of this file is of sts; allowed: one format a "
        "file",
    ]


def test_triplets_and_lists_are_one_format() -> None:
    rows, report = several({"query": "a", "pos": ["p"]}, {"query": "b", "positive": "p"})
    assert len(rows) == 2
    assert report.errors.total == 0


def test_columns_of_other_formats_are_not_read() -> None:
    _, report = parsed(PAIR | {"neg_scores": [], "lable": 1})
    assert set(report.warnings.counts) == {"column 'neg_scores' is not read", "column 'lable' is not read"}
    _, report = parsed({"query": "q", "pos": ["p"], "label": "x", "batch_size": 3})
    assert [str(kept[0]).split(": ")[2] for kept in report.warnings.kept.values()] == [
        "this column is not read",
        "this column is not read; set batch_size of this dataset in data.datasets",
    ]


def test_what_such_rows_cannot_have_is_no_warning() -> None:
    scored = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1], "neg_scores": [0], "prompt": "x"}
    report = Report()
    for file, values in (("a", [scored]), ("b", [PAIR, PAIR | {"sentence2": "other"}]), ("c", [TEXT])):
        records = [Record(file, i, value) for i, value in enumerate(values, 1)]
        list(survey(parse_rows(records, report), report))
    assert report.warnings.counts == {}
    assert (report.counts["rows of type sts"], report.counts["rows of type class"]) == (2, 1)


def test_rows_without_scores_are_unusual_only_among_those_that_may_have_some() -> None:
    report = Report()
    values = [{"query": "q", "pos": ["p"], "neg": ["n"]}, {"query": "r", "pos": ["p"], "neg": ["n"]}]
    records = [Record("a", 1, values[0]), Record("a", 2, values[1])]
    pairs = parse_rows([Record("b", 1, PAIR)], report)
    list(survey([*parse_rows(records, report), *pairs], report))
    assert report.warnings.counts == {}
    assert report.counts["rows without scores"] == 2


def test_a_text_under_two_labels_is_noted() -> None:
    _, report = several(TEXT, TEXT | {"label": "bad"}, TEXT, TEXT | {"text": "other"})
    assert [p.line for p in report.warnings.kept["texts of two labels"]] == [2]
    assert [p.line for p in report.warnings.kept["duplicate rows"]] == [3]


def test_another_dataset_may_label_the_same_text() -> None:
    report = Report()
    rows = [
        pair
        for name, label in (("a", "good"), ("b", "review"), ("c", "good"))
        for pair in parse_rows([Record(name, 1, TEXT | {"label": label})], report, dataset=name)
    ]
    assert len(list(survey(rows, report))) == 3
    assert report.warnings.counts == {}


def test_files_of_all_formats_mix(tmp_path: Path) -> None:
    files = {
        "r/medquad": [{"query": "q", "positive": "p", "negative": "n"}],
        "sts/pairs": [PAIR],
        "topic-no_in_batch_neg/train": [TEXT, TEXT | {"text": "b"}],
        "topic-no_in_batch_neg/more": [TEXT | {"text": "c"}],
    }
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    report = Report()
    sources = [str(tmp_path / folder) for folder in ("r", "sts", "topic-no_in_batch_neg/")]
    store = prepare_rows(sources, tmp_path / "cache", 2, report)
    report.raise_if_errors()
    rows = [row for part in store.iter_parts() for row in part.to_pylist()]
    assert [(row["dataset"], row["type"], row["label"], row["pos_scores"]) for row in rows] == [
        ("medquad", None, None, None),
        ("pairs", "sts", None, [1.0]),
        ("topic-no_in_batch_neg/more", "class", "good", None),
        ("topic-no_in_batch_neg/train", "class", "good", None),
        ("topic-no_in_batch_neg/train", "class", "good", None),
    ]
    corpus = corpus_of_rows(store, tmp_path / "cache", 9, report)
    assert [text for part in corpus.iter_parts(["text"]) for text in part.column("text").to_pylist()] == ["p", "n"]
