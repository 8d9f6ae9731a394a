"""The job split: every row whole, in the file of its range, whatever its format and wherever its file lay."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from rayembed.config import Experiment
from rayembed.data.length_split import split_by_length
from rayembed.data.prepare import prepare
from rayembed.data.problems import DataError
from rayembed.jobs import split
from rayembed.jobs.folders import ChangedError
from tests.jobs.conftest import MakeExperiment
from tests.jobs.toy_data import NUM_TRAIN, read_lines

BOUNDS = [0, 14, 20]
TEXTS = ["baba", "baba didi gugu", "lolo momo nana pepe ruru " * 2, "baba didi gugu lolo momo nana " * 9]
ROWS: list[dict[str, Any]] = [
    {"query": TEXTS[0], "pos": [TEXTS[0], TEXTS[1]], "neg": [], "prompt": "a prompt that is not counted " * 9},
    {"query": TEXTS[0], "pos": [TEXTS[1]], "neg": [TEXTS[0], TEXTS[3]], "pos_scores": [1.5], "neg_scores": [0, -2]},
    {"query": TEXTS[2], "pos": ["pepe"], "neg": ["lolo"], "type": "only_1neg", "mine": {"kept": ["ü", None, 3]}},
    {"query": "koko", "pos": ["kaka"]},
]
Make = Callable[..., Experiment]


@pytest.fixture
def make(make_experiment: MakeExperiment, tmp_path: Path) -> Make:
    """An experiment on files by their names, written first."""

    def made(files: dict[str, list[dict[str, Any]]], *further: str, bounds: list[int] = BOUNDS) -> Experiment:
        for name, rows in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = [*(str(tmp_path / name) for name in files), *further]
        return make_experiment(tmp_path / "run", data={"train": train, "corpus": []}, split={"length_list": bounds})

    return made


@pytest.fixture(scope="module")
def tokens(tiny_model: Path) -> Callable[[list[str]], int]:
    """Of the longest text, by the tokenizer itself, a text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda texts: max(len(tokenizer(text, truncation=False)["input_ids"]) for text in texts)


def test_the_second_text_is_in_its_range_by_its_special_tokens_alone(tiny_model: Path) -> None:
    """The data must show what is tested."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    counts = [len(tokenizer(TEXTS[1], add_special_tokens=added)["input_ids"]) for added in (False, True)]
    assert counts[0] < BOUNDS[1] <= counts[1] < BOUNDS[2]


def texts_of(row: dict[str, Any]) -> list[str]:
    single = [row[name] for name in ("query", "positive", "negative", "sentence1", "sentence2", "text") if name in row]
    return [*single, *row.get("pos", []), *row.get("neg", [])]


def range_of(length: int) -> str:
    return "0-14" if length < 14 else "14-20" if length < 20 else "20-inf"


def expected(name: str, rows: list[dict[str, Any]], tokens: Callable[[list[str]], int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(f"{name}_len-{range_of(tokens(texts_of(row)))}.jsonl", []).append(row)
    return found


def written(folder: Path) -> dict[str, Any]:
    return {path.name: read_lines(path) for path in folder.glob("*.jsonl")}


def test_every_row_is_in_the_file_of_its_range_with_all_its_columns(
    make: Make, tokens: Callable[[list[str]], int], caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "rows.jsonl": ROWS * 40,  # more than are counted together
        "pairs/sts.jsonl": [{"sentence1": text, "sentence2": "momo", "score": 0.25} for text in TEXTS],
        "labels/words.jsonl": [{"text": text, "label": i % 2, "origin": "here"} for i, text in enumerate(TEXTS)],
        "triplets.jsonl": [{"query": "a", "positive": "b", "negative": text} for text in TEXTS],
    }
    experiment = make(files)
    assert split.plan(experiment).endswith(
        "rows of 4 files into ranges of 0-14, 14-20, 20-inf tokens; would be written"
    )
    with caplog.at_level(logging.INFO, logger="rayembed"):
        folder = split.run(experiment)
    wanted: dict[str, Any] = {}
    for name, rows in files.items():
        wanted |= expected(Path(name).stem, rows, tokens)
    assert written(folder) == wanted
    assert {name.split("_len-")[1] for name in wanted} == {"0-14.jsonl", "14-20.jsonl", "20-inf.jsonl"}
    stats, counts = json.loads((folder / "stats.json").read_text()), Counter[str]()
    for name, rows in wanted.items():
        counts[name.split("_len-")[1].removesuffix(".jsonl")] += len(rows)
    assert stats == {"rows": 172, "ranges": counts, "files": {name: len(rows) for name, rows in wanted.items()}}
    told = ", ".join(f"{name} tokens {counts[name]}" for name in ("0-14", "14-20", "20-inf"))
    assert f"split: 172 rows of 4 files: {told}" in caplog.text


def test_what_is_written_is_read_as_the_same_rows(make: Make, make_experiment: MakeExperiment, beir: Path) -> None:
    files = {"a/train.jsonl": ROWS, "b-no_in_batch_neg/train.jsonl": ROWS}
    before = make(files, str(beir))
    folder = split.run(before)
    after = make_experiment(folder.parent / "again", data={"train": [str(folder)], "corpus": []})
    found = [prepare(one, corpus=False, evaluation=False).rows for one in (before, after)]
    assert found[0] is not None
    assert found[1] is not None
    rows = [[row for part in one.iter_parts() for row in part.to_pylist()] for one in found if one is not None]
    assert len(rows[0]) == len(rows[1]) == 2 * len(ROWS) + NUM_TRAIN
    own = ["query", "pos", "neg", "prompt", "pos_scores", "neg_scores", "type", "pos_ids"]
    texts = [sorted(json.dumps([row[name] for name in own]) for row in some) for some in rows]
    assert texts[0] == texts[1]
    marked = [name for name in written(folder) if name.startswith("b-")]
    assert marked
    assert all(name.endswith("-no_in_batch_neg.jsonl") for name in marked)


def test_parquet_becomes_jsonl(make: Make, tmp_path: Path) -> None:
    rows = [{"query": "a", "pos": ["b"], "neg": ["c"], "day": "2026-01-02"}]
    table = pa.Table.from_pylist(rows)
    day = table.column("day").cast(pa.date32())
    pq.write_table(table.set_column(3, "day", day), tmp_path / "rows.parquet")
    folder = split.run(make({}, str(tmp_path / "rows.parquet")))
    assert written(folder) == {"rows_len-0-14.jsonl": rows}


def test_a_killed_run_begins_anew_and_a_finished_one_is_not_made_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make({"a.jsonl": ROWS, "b.jsonl": ROWS})
    calls = []

    def dying(*arguments: Any) -> Any:  # noqa: ANN401
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the disk is full")
        return split_by_length(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(split, "split_by_length", dying)
        with pytest.raises(OSError, match="disk is full"):
            split.run(experiment)
    assert list((Path(experiment.output_dir) / "split.partial").glob("a_len*"))
    assert not (Path(experiment.output_dir) / "split").exists()
    folder = split.run(experiment)
    assert sum(map(len, written(folder).values())) == 2 * len(ROWS)
    monkeypatch.setattr(split, "split_by_length", dying)
    assert split.run(experiment) == folder
    assert len(calls) == 2, "up to date"
    with pytest.raises(ChangedError, match="length_list: was"):
        split.run(make({"a.jsonl": ROWS, "b.jsonl": ROWS}, bounds=[0, 9]))


def test_wrong_rows_and_ranges_are_refused_before_anything_is_written(make: Make) -> None:
    wrong = make({"a.jsonl": [*ROWS, {"query": "a"}]})
    with pytest.raises(DataError, match=r"a\.jsonl:5: pos: is missing"):
        split.run(wrong)
    with pytest.raises(ValueError, match=r"split\.length_list is \[5, 9\]; allowed: numbers of tokens that ascend"):
        split.run(make({"a.jsonl": ROWS}, bounds=[5, 9]))
    with pytest.raises(ValueError, match=r"split needs training rows; set data\.train"):
        split.run(make({}))
    assert not list(Path(wrong.output_dir).glob("split*"))
