"""One name for one text over sources that number their texts alike, the names of sources, and rows that follow."""

import random
from pathlib import Path

import pytest

from rayembed.data.fields import passage_id
from rayembed.data.names import (
    Names,
    dataset_names,
    note_absent_positives,
    says_no_in_batch_neg,
    source_names,
    with_ids_of,
)
from rayembed.data.problems import Report
from rayembed.data.store import PASSAGES, ROWS, Row, Store, StoreWriter

Triple = tuple[str, str, str]


def settled(triples: list[Triple], batch: int) -> list[tuple[str, bool, bool]]:
    names = Names()
    found = [name for i in range(0, len(triples), batch) for name in names.settle(triples[i : i + batch])]
    return [(name.name, name.met, name.conflict) for name in found]


def test_who_comes_first_keeps_the_id() -> None:
    triples = [("a", "1", "x"), ("b", "1", "y"), ("b", "1", "y"), ("a", "1", "x"), ("b", "2", "z"), ("c", "1", "y")]
    expected = [("1", False), ("b:1", False), ("b:1", True), ("1", True), ("2", False), ("c:1", False)]
    for batch in (1, 2, 6):
        assert settled(triples, batch) == [(name, met, False) for name, met in expected]


def test_one_id_of_one_source_stands_for_one_text() -> None:
    assert [conflict for _, _, conflict in settled([("a", "1", "x"), ("a", "1", "y")], 1)] == [False, True]
    renamed = [("a", "1", "x"), ("b", "1", "y"), ("b", "1", "z")]
    assert [conflict for _, _, conflict in settled(renamed, 1)] == [False, False, True]
    shared = [("a", "1", "x"), ("b", "1", "x"), ("b", "1", "y")]
    assert [conflict for _, _, conflict in settled(shared, 1)] == [False, False, True]


def test_a_name_made_here_that_is_an_id_already_is_a_conflict() -> None:
    assert settled([("a", "b:1", "w"), ("a", "1", "x"), ("b", "1", "y")], 1)[2] == ("b:1", True, True)


def test_no_name_stands_for_two_texts_and_no_text_of_a_source_has_two_names() -> None:
    draw = random.Random(0)
    text_of = {(source, name): draw.choice("xyz") for source in "abc" for name in "0123456"}
    triples = [(*key, text_of[key]) for key in draw.choices(list(text_of), k=300)]
    one = settled(triples, 1)
    assert settled(triples, 7) == one
    texts: dict[str, str] = {}
    names: dict[tuple[str, str], str] = {}
    for (source, bare, text), (name, met, conflict) in zip(triples, one, strict=True):
        assert not conflict
        assert met == (name in texts)
        assert texts.setdefault(name, text) == text
        assert names.setdefault((source, bare), name) == name
        assert name in (bare, f"{source}:{bare}")
    assert any(":" in name for name in texts)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/d/nq.jsonl"], ["nq"]),
        (["/d/nq.jsonl", "/e/hotpot/"], ["nq", "hotpot"]),
        (["/d/en/train.jsonl", "/d/de/train.jsonl"], ["en/train", "de/train"]),
        (["/d/a.json", "/d/a.jsonl"], ["a.json", "a.jsonl"]),
        (["s3://k:s@b/x.parquet?region=r", "/d/x.parquet"], ["b/x", "d/x"]),
        (["/d/a.jsonl", "/d/../d/a.jsonl"], ["a", "a"]),
        ([], []),
    ],
)
def test_sources_are_called_by_the_end_of_their_path(paths: list[str], expected: list[str]) -> None:
    assert source_names(paths) == dict(zip(paths, expected, strict=True))


def test_a_source_has_one_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (["t/a.jsonl", "u/a.jsonl"], [f"{tmp_path}/t/a.jsonl", "./u/a.jsonl"]):
        assert list(source_names(given).values()) == ["t/a", "u/a"]


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    writer = StoreWriter(tmp_path / "corpus", PASSAGES, 2)
    for name, text in (("1", "x"), ("2", "y"), ("b:1", "z"), ("c:2", "w")):
        writer.add({"id": name, "text": text})
    return writer.finish()


def row(dataset: str, pos: dict[str, str], neg: dict[str, str]) -> Row:
    ids = {"pos_ids": list(pos), "neg_ids": list(neg)}
    return {"query_id": "q", "query": "?", "dataset": dataset, "pos": [*pos.values()], "neg": [*neg.values()], **ids}


def test_rows_get_the_ids_that_the_corpus_has_for_their_texts(corpus: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayembed.data.names.ROWS_AT_A_TIME", 2)
    rows = [
        row("a", {"1": "x"}, {"2": "y"}),
        row("b", {"1": "z", "2": "y"}, {}),
        row("d", {"1": "other"}, {"2": "w", "9": "gone"}),
    ]
    found = list(with_ids_of(corpus, rows, ["c"]))
    ids = [(each["pos_ids"], each["neg_ids"]) for each in found]
    assert ids == [(["1"], ["2"]), (["b:1", "2"], []), (["1"], ["c:2", "9"])]
    assert [each["pos"] for each in found] == [each["pos"] for each in rows]


def test_related_passages_get_every_id_that_may_be_theirs(corpus: Store) -> None:
    rows = [row("a", {}, {}) | {"related_ids": names} for names in (["1", "2", "9"], ["9"], [], None)]
    found = [each["related_ids"] for each in with_ids_of(corpus, rows, ["b", "c"])]
    assert found == [["1", "b:1", "2", "c:2", "9"], ["9"], [], None]
    assert next(with_ids_of(corpus, [row("b", {}, {}) | {"related_ids": ["1"]}], []))["related_ids"] == ["1", "b:1"]


def test_positives_that_the_corpus_has_not_are_counted_with_their_row(tmp_path: Path, corpus: Store) -> None:
    writer = StoreWriter(tmp_path / "rows", ROWS, 2)
    for each in (row("a", {"1": "x"}, {"7": "n"}), row("a", {"2": "y", "8": "p"}, {}), row("b", {"9": "p"}, {})):
        writer.add(each)
    report = Report()
    note_absent_positives(writer.finish(), corpus, report)
    assert report.warnings.counts == {"positives that are not in the corpus by id": 2}
    assert [str(p) for each in report.warnings.kept.values() for p in each] == [
        "training rows:2: pos: '8', of query 'q' of a, is not in data.corpus",
        "training rows:3: pos: '9', of query 'q' of b, is not in data.corpus",
    ]


def test_ids_made_of_texts_are_not_looked_for_among_others(tmp_path: Path, corpus: Store) -> None:
    writer = StoreWriter(tmp_path / "rows", ROWS, 2)
    writer.add(row("a", {passage_id("bare text"): "bare text"}, {}))
    report = Report()
    note_absent_positives(writer.finish(), corpus, report)
    assert report.warnings.total == 0


def test_a_folder_that_says_no_in_batch_neg_is_in_the_names_of_its_files() -> None:
    paths = [
        "r/train.jsonl",
        "x-no_in_batch_neg/topics.jsonl",
        "./x-no_in_batch_neg//more.parquet",
        "y_no_in_batch_neg/",
    ]
    assert list(dataset_names(paths).values()) == [
        "train",
        "x-no_in_batch_neg/topics",
        "x-no_in_batch_neg/more",
        "y_no_in_batch_neg",
    ]
    same = ["r/train.jsonl", "x-no_in_batch_neg/train.jsonl"]
    assert list(dataset_names(same).values()) == ["r/train", "x-no_in_batch_neg/train"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x-no_in_batch_neg/topics", True),
        ("topics-no_in_batch_neg", True),
        ("topics-no_in_batch_neg.jsonl", True),
        ("a/topics-no_in_batch_neg", True),
        ("no_in_batch_neg-topics", False),
        ("x-no_in_batch_neg/a/b", False),
        ("topics", False),
    ],
)
def test_a_name_says_no_in_batch_neg_at_its_end(name: str, says: bool) -> None:
    assert says_no_in_batch_neg(name) is says


def test_scored_pairs_are_not_looked_for_in_the_corpus(tmp_path: Path, corpus: Store) -> None:
    writer = StoreWriter(tmp_path / "rows", ROWS, 2)
    writer.add(row("a", {"77": "far"}, {}) | {"type": "sts"})
    report = Report()
    note_absent_positives(writer.finish(), corpus, report)
    assert report.warnings.total == 0
