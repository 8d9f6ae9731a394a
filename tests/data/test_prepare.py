"""An experiment's data from files to stores, what is reused, and what is read again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.jobs import EncodeConfig
from rayembed.config.model import ModelConfig
from rayembed.data import prepare as prepare_module
from rayembed.data.fields import passage_id, query_id
from rayembed.data.prepare import VERSION, prepare, prepare_rows
from rayembed.data.problems import DataError, Report
from rayembed.data.store import Store

ROWS: list[dict[str, Any]] = [
    {"query": f"query {i}", "pos": [f"pos {i}"], "neg": [f"neg {i % 3}", f"neg {i % 3 + 1}"]} for i in range(10)
]


def write_lines(path: Path, values: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def experiment(tmp_path: Path, *, queries_per_unit: int = 4, seed: int = 42, **data: object) -> Experiment:
    """An experiment with these settings of its data section."""
    return Experiment(
        output_dir=str(tmp_path / "run"),
        seed=seed,
        model=ModelConfig(name_or_path="none"),
        data=TypeAdapter(DataConfig).validate_python(data),
        encode=EncodeConfig(passages_per_unit=3, queries_per_unit=queries_per_unit),
    )


def contents(store: Store | None) -> list[dict[str, Any]]:
    assert store is not None
    return [row for part in store.iter_parts() for row in part.to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A BEIR folder: 7 passages, 5 queries; 3 queries are judged in train, 2 in test."""
    base = tmp_path / "beir"
    write_lines(base / "corpus.jsonl", [{"_id": f"d{i}", "title": f"T{i}", "text": f"text {i}"} for i in range(7)])
    write_lines(base / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(5)])
    (base / "qrels").mkdir()
    head = "query-id\tcorpus-id\tscore\n"
    (base / "qrels/train.tsv").write_text(head + "q2\td0\t1\nq0\td1\t1\nq0\td2\t1\nq1\td3\t1\n")
    (base / "qrels/test.tsv").write_text(head + "q4\td5\t1\nq3\td6\t2\nq3\td5\t0\n")
    return str(base)


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a store was written again")

    monkeypatch.setattr(prepare_module, "StoreWriter", refuse)


def test_a_beir_folder_gives_rows_corpus_and_evaluation(tmp_path: Path, folder: str) -> None:
    prepared = prepare(experiment(tmp_path, train=[folder], corpus=[folder], evaluation=folder))
    prepared.report.raise_if_errors()
    rows = contents(prepared.rows)
    assert [(row["query_id"], row["pos_ids"]) for row in rows] == [("q2", ["d0"]), ("q0", ["d1", "d2"]), ("q1", ["d3"])]
    assert rows[1]["pos"] == ["T1 text 1", "T2 text 2"]
    assert rows[0]["dataset"] == "beir"
    assert contents(prepared.corpus) == [{"id": f"d{i}", "text": f"T{i} text {i}"} for i in range(7)]
    assert prepared.corpus is not None
    assert [part.num_rows for part in prepared.corpus.parts] == [3, 3, 1]
    assert prepared.evaluation is not None
    assert prepared.evaluation.corpus.folder == prepared.corpus.folder
    assert prepared.evaluation.qrels == {"q4": {"d5": 1}, "q3": {"d6": 2, "d5": 0}}
    assert [row["id"] for row in contents(prepared.evaluation.queries)] == ["q3", "q4"]
    assert prepared.report.counts[f"passages in {folder}/corpus.jsonl"] == 7
    assert prepared.report.counts["evaluation queries"] == 2


def test_the_least_grade_makes_other_rows(tmp_path: Path, folder: str) -> None:
    with (Path(folder) / "qrels/train.tsv").open("a") as file:
        file.write("q0\td5\t2\nq4\td1\t2\n")
    found = {}
    for grade in (1, 2, 3):
        prepared = prepare(experiment(tmp_path, train=[folder], corpus=[folder], min_grade=grade))
        rows = contents(prepared.rows)
        found[grade] = {row["query_id"]: (row["pos_ids"], row["related_ids"]) for row in rows}
    everything = {"q2": (["d0"], None), "q0": (["d1", "d2", "d5"], None), "q1": (["d3"], None), "q4": (["d1"], None)}
    assert found == {1: everything, 2: {"q0": (["d5"], ["d1", "d2"]), "q4": (["d1"], None)}, 3: {}}
    assert "6 judgements are below data.min_grade" in next(prepared.report.errors.lines())


def test_only_what_is_asked_for(tmp_path: Path, folder: str) -> None:
    whole = experiment(tmp_path, train=[folder], evaluation=folder)
    prepared = prepare(whole, rows=False, evaluation=False)
    assert (prepared.rows, prepared.evaluation) == (None, None)
    assert {row["id"] for row in contents(prepared.corpus)} == {"d0", "d1", "d2", "d3"}
    empty = prepare(experiment(tmp_path))
    assert (empty.rows, empty.corpus, empty.evaluation) == (None, None, None)


def test_without_a_corpus_all_passages_of_the_rows_are_one(tmp_path: Path) -> None:
    prepared = prepare(experiment(tmp_path, train=[write_lines(tmp_path / "t.jsonl", ROWS)]))
    texts = list(dict.fromkeys(text for row in ROWS for text in [*row["pos"], *row["neg"]]))
    assert contents(prepared.corpus) == [{"id": passage_id(text), "text": text} for text in texts]
    assert prepared.corpus is not None
    assert prepared.rows is not None
    stored = contents(prepared.rows)
    assert (prepared.corpus.find_ids([name for row in stored for name in row["pos_ids"] + row["neg_ids"]]) >= 0).all()
    assert [row["query_id"] for row in stored] == [query_id(row["query"]) for row in ROWS]
    assert not any("repeated" in kind for kind in prepared.report.warnings.counts)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    found = []
    for name in ("a.jsonl", "b.json", "c.parquet"):
        store = prepare_rows([str(tmp_path / name)], tmp_path / "cache", 4, Report())
        found.append([{k: v for k, v in row.items() if k != "dataset"} for row in contents(store)])
    assert [row["query"] for row in found[0]] == [row["query"] for row in ROWS]
    assert found[0] == found[1] == found[2]


def test_sources_keep_their_order_and_files_of_a_folder_are_sorted(tmp_path: Path) -> None:
    for name in ("two/b", "two/a", "one"):
        write_lines(tmp_path / f"{name}.jsonl", [{"query": name, "pos": ["p"]}])
    store = prepare_rows([str(tmp_path / "two"), str(tmp_path / "*.jsonl")], tmp_path / "cache", 4, Report())
    assert [row["query"] for row in contents(store)] == ["two/a", "two/b", "one"]
    assert [row["dataset"] for row in contents(store)] == ["a", "b", "one"]


def test_output_of_mining_is_read_back(tmp_path: Path) -> None:
    row = ROWS[0] | {"query_id": "q", "pos_ids": ["1"], "neg_ids": ["2", "3"], "dataset": "set"}
    write_lines(tmp_path / "mine" / "part-00000.jsonl", [row])
    (tmp_path / "mine" / "stats.json").write_text("{}")
    report = Report()
    store = prepare_rows([str(tmp_path / "mine")], tmp_path / "cache", 4, report)
    report.raise_if_errors()
    assert [{name: stored[name] for name in row} for stored in contents(store)] == [row]


def test_reuse_reads_nothing_and_tells_the_same(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "t.jsonl", [*ROWS, ROWS[0]])
    whole = experiment(tmp_path, train=[f"{tmp_path}/t.jsonl", folder], corpus=[folder], evaluation=folder)
    first = prepare(whole)
    no_reading(monkeypatch)
    second = prepare(whole)
    assert second.report.summary() == first.report.summary()
    assert second.report.warnings.counts["duplicate rows"] == 1
    assert first.rows is not None
    assert second.rows is not None
    assert second.rows.fingerprint == first.rows.fingerprint


def test_what_had_errors_is_read_again(tmp_path: Path, folder: str) -> None:
    rows = tmp_path / "t.jsonl"
    whole = experiment(tmp_path, train=[write_lines(rows, ROWS), folder], corpus=[folder], evaluation=folder)
    files = {path: path.read_text() for path in (rows, Path(folder) / "corpus.jsonl", Path(folder) / "queries.jsonl")}
    times = {path: path.stat().st_mtime_ns for path in files}
    for path, text in files.items():
        path.write_text("[" + text[1:])
        os.utime(path, ns=(times[path], times[path]))
    assert prepare(whole).report.errors.counts["not JSON"] == 3
    for path, text in files.items():
        path.write_text(text)
        os.utime(path, ns=(times[path], times[path]))
    prepare(whole).report.raise_if_errors()


def test_a_dropped_connection_is_no_fact_about_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    whole = experiment(tmp_path, train=[f"{tmp_path}/t.parquet"])

    def drop(*_: object, **__: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", drop)
        with pytest.raises(OSError, match=r"t\.parquet: reading failed after row 0 \(AWS Error"):
            prepare(whole)
    prepared = prepare(whole)
    prepared.report.raise_if_errors()
    assert len(contents(prepared.rows)) == 10


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"])
def test_a_changed_file_is_read_again(tmp_path: Path, folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment(tmp_path, train=[folder], corpus=[folder], evaluation=folder)
    prepare(whole)
    path = Path(folder) / name
    path.write_text(path.read_text() + "\n")
    no_reading(monkeypatch)
    with pytest.raises(AssertionError, match="written again"):
        prepare(whole)


def test_a_changed_file_gives_another_store(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    whole = experiment(tmp_path, train=[write_lines(path, ROWS)])
    first = prepare(whole)
    write_lines(path, ROWS[:-1])
    second = prepare(whole)
    assert first.rows is not None
    assert second.rows is not None
    assert (first.rows.num_rows, second.rows.num_rows) == (10, 9)
    assert first.rows.folder != second.rows.folder


def test_a_killed_reading_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment(tmp_path, train=[write_lines(tmp_path / "t.jsonl", ROWS)])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rayembed.data.store.write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(whole)
    assert [path.suffix for path in (tmp_path / "run/cache").glob("[!.]*")] == [".partial"]
    assert len(contents(prepare(whole).rows)) == 10


def drawn(tmp_path: Path, number: int, *, queries_per_unit: int = 4, seed: int = 42) -> list[str]:
    sources = [str(tmp_path / "t.jsonl"), str(tmp_path / "u.jsonl")]
    data = {"train": sources, "max_example_num_per_dataset": number}
    whole = experiment(tmp_path, queries_per_unit=queries_per_unit, seed=seed, **data)
    return [row["query"] for row in contents(prepare(whole).rows)]


def test_rows_are_drawn_of_each_dataset_with_the_seed(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", [{"query": f"t{i:02}", "pos": ["p"]} for i in range(40)])
    write_lines(tmp_path / "u.jsonl", [{"query": f"u{i:02}", "pos": ["p"]} for i in range(3)])
    five = drawn(tmp_path, 5)
    assert five == sorted(five)
    assert [name[0] for name in five] == ["t"] * 5 + ["u"] * 3
    assert drawn(tmp_path, 5, queries_per_unit=7) == five
    assert drawn(tmp_path, 5, seed=43) != five
    assert set(five) < set(drawn(tmp_path, 6))
    assert five != [f"t{i:02}" for i in range(5)] + ["u00", "u01", "u02"]
    assert len(drawn(tmp_path, 100)) == 43


def test_errors_of_all_files_are_told_together(tmp_path: Path, folder: str) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"query": "a", "pos": []}, [], {"query": "b", "pos": ["p"], "neg": "x"}])
    (Path(folder) / "qrels/train.tsv").write_text("q0\td1\t1\nq0\tgone\t1\n")
    (Path(folder) / "qrels/test.tsv").write_text("lost\td1\t1\n")
    whole = experiment(
        tmp_path, train=[bad, folder, f"{tmp_path}/none*.jsonl"], corpus=[f"{tmp_path}/no.jsonl"], evaluation=folder
    )
    with pytest.raises(DataError) as caught:
        prepare(whole).report.raise_if_errors()
    found = {line.strip().split(": ")[0].removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()[1:-1]}
    assert found == {
        *("bad.jsonl:1", "bad.jsonl:2", "bad.jsonl:3", "beir/qrels/train.tsv:2", "beir/qrels/test.tsv:1"),
        *("none*.jsonl", "no.jsonl"),
    }


def test_no_rows_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    prepared = prepare(experiment(tmp_path, train=[write_lines(tmp_path / "t.jsonl", [])]))
    assert list(prepared.report.errors.lines()) == [f"{tmp_path}/t.jsonl: data.train: holds no training row"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus.jsonl", "\n", "corpus.jsonl: no passages in it"),
        ("queries.jsonl", "", "queries.jsonl: no queries in it"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "qrels/test.tsv: holds no judgement"),
        ("qrels/test.tsv", "q4\td5\t0\nq3\td6\t-1\n", "qrels/test.tsv: score: no judgement is above 0"),
    ],
)
def test_an_empty_evaluation_is_an_error(tmp_path: Path, folder: str, name: str, text: str, message: str) -> None:
    (Path(folder) / name).write_text(text)
    report = prepare(experiment(tmp_path, evaluation=folder)).report
    assert next(report.errors.lines()).startswith(f"{folder}/{message}")


def test_an_empty_corpus_is_an_error_and_an_empty_shard_is_none(tmp_path: Path) -> None:
    empty, full = write_lines(tmp_path / "c0.jsonl", []), write_lines(tmp_path / "c1.jsonl", [{"text": "a"}])
    report = prepare(experiment(tmp_path, corpus=[empty])).report
    assert list(report.errors.lines()) == [f"{empty}: no passages in it"]
    prepared = prepare(experiment(tmp_path, corpus=[empty, full]))
    prepared.report.raise_if_errors()
    assert len(contents(prepared.corpus)) == 1


def test_an_evaluation_that_is_no_beir_folder_is_an_error(tmp_path: Path) -> None:
    prepared = prepare(experiment(tmp_path, evaluation=str(tmp_path)))
    assert prepared.evaluation is None
    assert next(prepared.report.errors.lines()).startswith(f"{tmp_path}: data.evaluation: is not a BEIR folder")


def test_an_id_of_two_passages_of_the_rows_is_an_error(tmp_path: Path) -> None:
    rows = [{"query": "a", "pos": ["x"], "pos_ids": ["1"]}, {"query": "b", "pos": ["y"], "pos_ids": ["1"]}]
    prepared = prepare(experiment(tmp_path, train=[write_lines(tmp_path / "t.jsonl", rows)]))
    assert next(prepared.report.errors.lines()).startswith("training rows:2: id: '1' stood for another text")


EVERY_FORMAT: dict[str, list[dict[str, Any]]] = {
    "flag": [{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [0.5], "prompt": "p: "}],
    "ids": [{"query": "q", "query_id": 7, "pos": ["a"], "pos_ids": ["x"], "neg": [], "related_ids": ["y"]}],
    "triplets": [{"query": "q", "positive": "a", "negative": "b"}],
    "pairs": [{"sentence1": "a", "sentence2": "b", "score": 0.5}],
    "labels": [{"text": "a", "label": 1}],
    "symmetric_sts": [{"query": "a", "pos": ["b"], "neg": ["c"], "type": "symmetric_sts"}],
    "clustering": [{"query": "a", "pos": ["b"], "neg": ["c"], "type": "symmetric_clustering", "category": "birds"}],
    "class": [{"query": "a", "pos": [], "neg": [], "type": "class", "label": "birds"}],
}


def test_rows_that_are_read_otherwise_than_before_have_another_version(tmp_path: Path, folder: str) -> None:
    """Cached stores of older code would be used for them."""
    files = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in EVERY_FORMAT.items()]
    found = prepare(experiment(tmp_path, train=[*files, folder], corpus=[folder], evaluation=folder))
    found.report.raise_if_errors()
    assert found.evaluation is not None
    digest = hashlib.sha256()
    for store in (found.rows, found.corpus, found.evaluation.corpus, found.evaluation.queries):
        assert store is not None
        columns = [[field.name, str(field.type), field.nullable] for field in store.schema]
        digest.update(json.dumps([columns, contents(store)], sort_keys=True).encode())
    assert (VERSION, digest.hexdigest()[:16]) == (5, "6bd8453a303ac1ae"), (
        "raise prepare.VERSION where a row is another, then write both here"
    )
