"""Texts that a teacher reads: one that was trained here reads rows as training does, a foreign one bare texts."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayembed.config import Experiment
from rayembed.data.store import Row
from rayembed.jobs import mine, score
from rayembed.jobs import pairs as jobs_pairs
from rayembed.jobs.teacher import embedding_teacher, teacher_reads, teacher_wording
from rayembed.models.pairs import PairReading
from rayembed.models.settings_file import write_settings
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_data import read_lines
from tests.jobs.without_ray import do_units_here

OWN = {
    "query_instruction_for_retrieval": "Web: ",
    "query_instruction_format": "{}{} ?",
    "passage_instruction_for_retrieval": "P: ",
}
ROWS: list[Row] = [
    {"query": "ab", "pos": ["good", "fine"], "neg": ["cd"], "prompt": "Code: "},
    {"query": "ab", "pos": ["ef"], "neg": ["good"]},
    {"query": "gh", "pos": ["ij"], "neg": ["kl"], "prompt": "Same? ", "type": "symmetric_sts"},
    {"query": "gh", "pos": ["ij"], "neg": ["mn"], "type": "symmetric_clustering", "category": "a"},
]
READ = [  # query, positives, negatives as training has them
    ("Code: ab ?", ["P: good", "P: fine"], ["P: cd"]),
    ("Web: ab ?", ["P: ef"], ["P: good"]),
    ("Same? gh ?", ["Same? ij ?"], ["Same? kl ?"]),
    ("Web: gh ?", ["Web: ij ?"], ["Web: mn ?"]),
]
BARE = [("A: " + str(row["query"]), row["pos"], row["neg"]) for row in ROWS]


@pytest.fixture(autouse=True)
def here() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        yield do_units_here(patch)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"train": [str(file)], "corpus": [], "query_max_len": 24, "passage_max_len": 48}


def trained_here(make_experiment: MakeExperiment, base: Path, family: str, folder: Path) -> Path:
    """A folder as training leaves it, with the instructions of OWN."""
    pooling = "mean" if family == "encoder" else None
    own = {"name_or_path": str(base), "family": family, "pooling": pooling, **OWN}
    write_settings(make_experiment(folder, model=own), shutil.copytree(base, folder))
    return folder


@torch.inference_mode()
def logits(folder: Path, query: str, passages: Sequence[str]) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return [model(**tokenizer(query, text, return_tensors="pt")).logits.item() for text in passages]


def products(folder: Path, query: str, passages: Sequence[str]) -> list[float]:
    found: list[float] = (vectors(folder, list(passages), 48) @ vectors(folder, [query], 24)[0]).tolist()
    return found


def check_scores(
    folder: Path, read: Sequence[tuple[str, list[str], list[str]]], by: Callable[..., list[float]]
) -> None:
    rows = read_lines(folder)
    for row, (query, pos, neg) in zip(rows, read, strict=True):
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(by(query, pos + neg), abs=1e-5)


@pytest.mark.parametrize("family", ["reranker-encoder", "encoder"])
def test_a_teacher_that_was_trained_here_reads_rows_as_training_does(
    family: str,
    make_experiment: MakeExperiment,
    tiny_reranker: Path,
    tiny_model: Path,
    data: dict[str, Any],
    tmp_path: Path,
) -> None:
    base, by = (tiny_model, products) if family == "encoder" else (tiny_reranker, logits)
    teacher = {"model": str(trained_here(make_experiment, base, family, tmp_path / "teacher"))}
    made = make_experiment(tmp_path / "run", data=data, score=teacher)
    check_scores(score.run(made), READ, lambda *texts: by(base, *texts))
    name = "query_instruction_for_" + ("retrieval" if family == "encoder" else "rerank")
    other = make_experiment(tmp_path / "told", data=data, score={**teacher, name: "Find "})
    told = [
        (query.replace("Web: ab ?", "Find ab").replace("Web: gh ?", "Find gh"), pos, neg) for query, pos, neg in READ
    ]
    told[3] = ("Find gh", ["Find ij"], ["Find mn"])
    check_scores(score.run(other), told, lambda *texts: by(base, *texts))


def test_a_foreign_teacher_reads_bare_texts_with_its_own_instruction(
    make_experiment: MakeExperiment, tiny_reranker: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    told = {"model": str(tiny_reranker), "max_len": 64, "query_instruction_for_rerank": "A: "}
    made = make_experiment(tmp_path / "run", data=data, score=told)
    assert teacher_wording(made) is None
    assert "wording" not in teacher_reads(made)
    check_scores(score.run(made), BARE, lambda *texts: logits(tiny_reranker, *texts))


def test_how_rows_are_put_is_in_the_record(
    make_experiment: MakeExperiment, tiny_reranker: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    teacher = trained_here(make_experiment, tiny_reranker, "reranker-encoder", tmp_path / "teacher")
    made = make_experiment(tmp_path / "run", data=data, score={"model": str(teacher)})
    assert teacher_reads(made)["wording"]["query_instruction"] == "Web: "
    assert teacher_reads(made, worded=False) != teacher_reads(made)


class Liker:
    """Likes "good", where both texts are put as row 0 or row 1 of READ has them."""

    def __init__(self, asked: list[tuple[str, str]]) -> None:
        self.asked = asked
        self.reading: PairReading | None = None

    def score(self, pairs: Sequence[tuple[str, str]], **_: object) -> NDArray[np.float32]:
        assert self.reading is not None
        read = self.reading.texts(pairs)
        self.asked += read
        found = [query in (READ[0][0], READ[1][0]) and text == "P: good" for query, text in read]
        return np.array(found, np.float32)


@pytest.mark.parametrize("denoise", [True, False])
def test_what_is_mined_is_judged_as_training_reads_it(
    denoise: bool,
    make_experiment: MakeExperiment,
    tiny_reranker: Path,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []
    liker = Liker(asked)

    def load(*_: object, reading: PairReading, **__: object) -> Liker:
        liker.reading = reading
        return liker

    monkeypatch.setattr(jobs_pairs, "load_reranker", load)
    teacher = trained_here(make_experiment, tiny_reranker, "reranker-encoder", tmp_path / "teacher")
    rows = [{**ROWS[0], "pos": ["fine"]}, {**ROWS[1], "query": "xy"}, *ROWS[2:]]
    Path(data["train"][0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"_id": "{i}", "text": "{text}"}}\n' for i, text in CORPUS))
    settings = {"range_for_sampling": "0-9", "negative_number": 9, "fill_up": False, "near_duplicate": None}
    made = make_experiment(
        tmp_path / "run",
        data={**data, "corpus": [str(tmp_path / "corpus.jsonl")]},
        score={"model": str(teacher)},
        mine={**settings, "denoise": denoise},
    )
    folder = mine.run(made)
    negatives = [row["neg"] for row in read_lines(folder)]
    assert ["good" in own for own in negatives] == [not denoise, True, True, True]
    assert json.loads((folder / "stats.json").read_text())["judged_pairs"] == sum(map(len, negatives))
    assert {query for query, _ in asked} == {"Code: ab ?", "Web: xy ?", "Same? gh ?", "Web: gh ?"}
    for query, text in asked:
        words = {"Same? gh ?": ("Same? ", " ?"), "Web: gh ?": ("Web: ", " ?")}.get(query, ("P: ", ""))
        assert text.startswith(words[0])
        assert text.endswith(words[1])
        assert text[len(words[0]) : len(text) - len(words[1])] in {"fine", *(text for _, text in CORPUS)}


CORPUS = list(enumerate(["good", "ef", "ij", "kl", "op qr"]))


def test_examples_of_an_icl_teacher_keep_their_instructions(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path
) -> None:
    def icl_settings(made: Experiment) -> tuple[list[str | None], str | None]:
        assert made.icl is not None
        return [one.instruct for one in made.icl.examples_for_task], made.model.query_instruction_for_retrieval

    examples = [{"query": "q", "response": "r"}, {"query": "q", "response": "r", "instruct": "Code: "}]
    own = {"name_or_path": str(tiny_model), "family": "icl", "pooling": None, **OWN}
    made = make_experiment(tmp_path / "run", model=own, icl={"examples_for_task": examples})
    folder = shutil.copytree(tiny_model, tmp_path / "teacher")
    write_settings(made, folder)
    asked = make_experiment(tmp_path / "run", score={"model": str(folder), "kind": "embedder"})
    assert icl_settings(embedding_teacher(asked)) == ([None, "Code: "], "Web: ")
    assert icl_settings(embedding_teacher(asked, worded=True)) == (["Web: ", "Code: "], None)
