"""Several data sets in one experiment: ids that they number alike, and paths written in other ways."""

from pathlib import Path

import pytest

from rayembed.data.prepare import Prepared, prepare, prepare_rows
from rayembed.data.problems import Report
from tests.data.test_prepare import ROWS, contents, experiment, write_lines


def beir_folder(base: Path, name: str) -> str:
    """Passages 0 to 3 and queries 0 to 2, of which 3 and 2 have the same text in every folder."""
    passages = [f"passage {i} of {name}" for i in range(3)] + ["passage of all"]
    queries = [f"query {i} of {name}" for i in range(2)] + ["query of all"]
    write_lines(base / name / "corpus.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(passages)])
    write_lines(base / name / "queries.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(queries)])
    (base / name / "qrels").mkdir()
    (base / name / "qrels" / "train.tsv").write_text("0\t0\t1\n1\t1\t1\n1\t3\t1\n2\t3\t1\n")
    return str(base / name)


def assert_ids_stand_for_their_texts(prepared: Prepared) -> None:
    """Every passage of the rows has the id that its text has in the corpus, and ids are unique."""
    prepared.report.raise_if_errors()
    corpus = contents(prepared.corpus)
    text_of = {passage["id"]: passage["text"] for passage in corpus}
    assert len(text_of) == len(corpus)
    for row in contents(prepared.rows):
        for side in ("pos", "neg"):
            assert [text_of[name] for name in row[f"{side}_ids"]] == row[side]


@pytest.mark.parametrize("corpus", [("a", "b"), ("b", "a"), ()])
def test_beir_folders_with_the_same_numbers_are_told_apart(tmp_path: Path, corpus: tuple[str, ...]) -> None:
    folders = {name: beir_folder(tmp_path, name) for name in ("a", "b")}
    whole = experiment(tmp_path, train=list(folders.values()), corpus=[folders[name] for name in corpus])
    prepared = prepare(whole)
    assert_ids_stand_for_their_texts(prepared)
    assert [row["query_id"] for row in contents(prepared.rows)] == ["0", "1", "2", "b:0", "b:1", "2"]
    later = corpus[1] if corpus else "b"
    assert {row["id"] for row in contents(prepared.corpus) if ":" in row["id"]} >= {f"{later}:0", f"{later}:1"}
    assert prepared.report.warnings.counts["query ids of two datasets, renamed"] == 2
    assert "positives that are not in the corpus by id" not in prepared.report.warnings.counts
    again = prepare(whole)
    assert again.report.summary() == prepared.report.summary()
    assert again.rows == prepared.rows


def test_rows_of_files_follow_the_corpus_that_holds_their_texts(tmp_path: Path) -> None:
    folders = [beir_folder(tmp_path, name) for name in ("a", "b")]
    row = {"query": "q", "pos": ["passage 1 of b"], "pos_ids": ["1"], "neg": ["passage 0 of a"], "neg_ids": ["0"]}
    train = write_lines(tmp_path / "mine.jsonl", [row])
    prepared = prepare(experiment(tmp_path, train=[train], corpus=folders))
    assert_ids_stand_for_their_texts(prepared)
    assert [(each["pos_ids"], each["neg_ids"]) for each in contents(prepared.rows)] == [(["b:1"], ["0"])]


def test_shards_of_one_corpus_may_not_use_an_id_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_lines(tmp_path / "corpus" / f"{name}.jsonl", [{"id": "1", "text": f"text of {name}"}])
    report = prepare(experiment(tmp_path, corpus=[f"{tmp_path}/corpus"])).report
    errors = list(report.errors.lines())
    assert len(errors) == 1
    assert errors[0].startswith(f"{tmp_path}/corpus/b.jsonl:1: id: '1' stood for another text before")


def test_a_path_written_otherwise_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_lines(tmp_path / "sub" / "t.jsonl", ROWS)
    beir = beir_folder(tmp_path, "a")
    written = ([path, beir], ["sub/t.jsonl", "./a"], ["sub", "sub/../a/"])
    stores = [prepare_rows(list(sources), tmp_path / "cache", 4, Report()) for sources in written]
    assert len({store.fingerprint for store in stores}) == 1
    draws = [
        prepare_rows(list(sources), tmp_path / f"cache{i}", 4, Report(), max_rows=2, seed=1).fingerprint
        for i, sources in enumerate(written)
    ]
    assert len(set(draws)) == 1


def test_positives_outside_the_corpus_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write_lines(tmp_path / "t.jsonl", ROWS)
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": f"pos {i}"} for i in range(8)])
    whole = experiment(tmp_path, train=[train], corpus=[corpus])
    for _ in range(2):
        warnings = prepare(whole).report.warnings
        assert warnings.counts["positives that are not in the corpus by id"] == 2
        place = warnings.kept["positives that are not in the corpus by id"][0]
        assert (place.line, place.field) == (9, "pos")
        monkeypatch.setattr("rayembed.data.prepare.note_absent_positives", None)  # the second time it is not counted
