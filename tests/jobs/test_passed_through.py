"""Scored pairs and labelled texts among the rows of mine and score: they come out as they went in."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.data.datasets import read_datasets
from rayembed.data.prepare import prepare
from rayembed.data.store import Row, Store
from rayembed.data.tasks import OF_OWN_KIND
from rayembed.jobs import check, mine, score
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.inputs import training_rows
from rayembed.jobs.mined_rows import RowWorker
from rayembed.jobs.pairs import PairCounts, PairScores, PairSource
from rayembed.jobs.passed_through import retrieval_rows
from rayembed.jobs.units import UnitError
from tests.jobs.conftest import MakeExperiment
from tests.jobs.toy_data import read_lines, write_rows
from tests.jobs.without_ray import do_units_here

OTHERS = {"sts": 5, "labels-no_in_batch_neg/words": 4, "own pairs": 30, "own labels": 30}
MINE = {"range_for_sampling": "0-20", "negative_number": 4, "max_uses": 6}
Make = Callable[..., Experiment]


@pytest.fixture(autouse=True)
def here() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        yield do_units_here(patch)


@pytest.fixture(scope="module")
def folder(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose other rows stand first, last, between and, more of them than a unit has rows, one after the other."""
    folder = tmp_path_factory.mktemp("others")
    retrieval = read_lines(write_rows(beir, folder / "rows.jsonl"))
    marked, mixed = retrieval[:20], list[Row]()
    for i, row in enumerate(retrieval[20:]):
        cluster = {"dataset": "clusters", "type": "symmetric_clustering", "category": i % 2} if i >= 50 else {}
        mixed.append({**row, "dataset": "found", "prompt": "Find: " if i % 3 else None, **cluster})
        if 10 <= i < 40:
            pair = {
                "query": f"left {i}",
                "pos": [f"right {i}"],
                "neg": [],
                "pos_scores": [i / 7 - 3],
                "pos_ids": [f"r{i}"],
            }
            mixed.append({**pair, "type": "sts", "dataset": "own pairs", "prompt": " Same? " if i % 2 else None})
        if i == 33:
            text = {"neg": [], "pos": [], "type": "class", "dataset": "own labels", "query_id": "x"}
            mixed += [{**text, "query": f"text {n}", "label": n % 3, "query_id": f"t{n}"} for n in range(30)]
    files: dict[str, list[Row]] = {
        "sts.jsonl": [{"sentence1": f"one {n}", "sentence2": f"two {n}", "score": n} for n in range(5)],
        "mixed.jsonl": mixed,
        "marked-no_in_batch_neg/train.jsonl": marked,
        "labels-no_in_batch_neg/words.jsonl": [{"text": f"word {n}", "label": f"about {n % 2}"} for n in range(4)],
    }
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = [
        {key: value for key, value in row.items() if value is not None}
        for row in mixed
        if row.get("type") not in OF_OWN_KIND
    ]
    (folder / "found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    return folder


@pytest.fixture(scope="module")
def make(make_experiment: MakeExperiment, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """An experiment in a run folder of its own; what was made on the way is shared."""
    cache, runs = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("runs")
    all_files = ["sts.jsonl", "mixed.jsonl", "marked-no_in_batch_neg", "labels-no_in_batch_neg"]

    def made(
        name: str,
        *,
        rows_per_unit: int = 32,
        files: list[str] = all_files,
        own_cache: bool = False,
        **sections: Any,  # noqa: ANN401
    ) -> Experiment:
        data = {"train": [str(folder / file) for file in files], "corpus": []}
        experiment = make_experiment(runs / name, data=data, encode={"queries_per_unit": rows_per_unit}, **sections)
        used = runs / f"cache of {name}" if own_cache else cache
        return type(experiment)(**{**vars(experiment), "cache_dir": str(used)})

    return made


@pytest.fixture(scope="module")
def mined(make: Make) -> Experiment:
    experiment = make("mined", mine=MINE)
    with pytest.MonkeyPatch.context() as patch:
        do_units_here(patch)
        mine.run(experiment)
    return experiment


def in_order(rows: Store) -> list[Row]:
    return [row for part in rows.iter_parts() for row in part.to_pylist()]


def others(rows: list[Row]) -> list[tuple[int, Row]]:
    return [(i, row) for i, row in enumerate(rows) if row["type"] in OF_OWN_KIND]


def given(experiment: Experiment) -> list[Row]:
    rows = prepare(experiment, corpus=False, evaluation=False).rows
    assert rows is not None
    return in_order(rows)


def lines(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl")))


def stats(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stats.json").read_text())
    return found


def check_round_trip(experiment: Experiment, job: str) -> None:
    """Every row in its place, those of other kinds with all that they had."""
    before, after = given(experiment), in_order(training_rows(experiment, after=(job,))[0])
    assert len(others(before)) == sum(OTHERS.values()), "the data must show what is tested"
    assert [row["query_id"] for row in after] == [row["query_id"] for row in before]
    assert others(after) == others(before)
    kept = ("query", "prompt", "pos", "pos_ids", "dataset", "type", "label")
    assert [[row[name] for name in kept] for row in after] == [[row[name] for name in kept] for row in before]


def test_mining_leaves_other_rows_as_they_are(mined: Experiment) -> None:
    check_round_trip(mined, "mine")
    assert stats(Path(mined.output_dir) / "mine")["passed_through"] == OTHERS


def test_their_texts_are_no_passages(mined: Experiment, folder: Path) -> None:
    rows = in_order(training_rows(mined, after=("mine",))[0])
    mined_rows = [row for row in rows if row["type"] not in OF_OWN_KIND]
    texts = {text for row in read_lines(folder / "rows.jsonl") for text in row["pos"] + row["neg"]}
    assert all(len(row["neg"]) == 4 for row in mined_rows)
    assert {text for row in mined_rows for text in row["neg"]} <= texts
    assert stats(Path(mined.output_dir) / "mine")["passages"] == len(texts)


def test_the_others_are_mined_as_if_alone(mined: Experiment, make: Make) -> None:
    alone = make("alone", own_cache=True, files=["found.jsonl", "marked-no_in_batch_neg"], mine=MINE)
    expected, whole = mine.run(alone), Path(mined.output_dir) / "mine"
    assert [row for row in read_lines(whole) if row.get("type") not in OF_OWN_KIND] == read_lines(expected)
    assert stats(whole) == {**stats(expected), "passed_through": OTHERS}
    assert not re.search(r"(left|right|text|word|one|two) \d", (whole / "audit.html").read_text())


@pytest.mark.parametrize("rows_per_unit", [7, 1000])
def test_the_files_are_the_same_however_rows_are_cut(mined: Experiment, make: Make, rows_per_unit: int) -> None:
    experiment = make(f"cut-{rows_per_unit}", rows_per_unit=rows_per_unit, mine=MINE)
    assert lines(mine.run(experiment)) == lines(Path(mined.output_dir) / "mine")


def test_an_interrupted_run_ends_with_the_same_rows(mined: Experiment, make: Make) -> None:
    experiment, own = make("killed", mine=MINE), RowWorker.__call__

    def dying(self: RowWorker, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        if spec["part"] == 1:
            raise OSError("the disk is full")
        return own(self, spec, name, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowWorker, "__call__", dying)
        with pytest.raises(UnitError, match="the disk is full"):
            mine.run(experiment)
    assert lines(mine.run(experiment)) == lines(Path(mined.output_dir) / "mine")


def test_rows_that_pass_through_and_changed_are_not_taken_for_the_old_ones(mined: Experiment, make: Make) -> None:
    fewer = make("mined", files=["sts.jsonl", "mixed.jsonl", "marked-no_in_batch_neg"], mine=MINE)
    with pytest.raises(ChangedError, match=r"\n  rows: was \w+, is \w+\nUse"):
        mine.run(fewer)
    assert mine.run(mined).is_dir()


def test_scores_are_of_the_rows_of_retrieval_alone(
    make: Make, tiny_reranker: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "ROWS_PER_PART", 16)  # several parts, so that their cut can be wrong
    teacher = {"model": str(tiny_reranker), "max_len": 64}
    denoised = {**MINE, "denoise": True, "denoise_margin": 0.002}
    whole = make("scored", mine=denoised, score=teacher)
    alone = make(
        "scored-alone", own_cache=True, files=["found.jsonl", "marked-no_in_batch_neg"], mine=denoised, score=teacher
    )
    counted = score.counted_scores
    cuts: list[tuple[int, ...]] = []

    def noted(experiment: Experiment, source: PairSource, *, what: str) -> tuple[PairScores, PairCounts]:
        cuts.append(source.sizes)
        return counted(experiment, source, what=what)

    monkeypatch.setattr(score, "counted_scores", noted)
    assert whole.cache_dir != alone.cache_dir
    with caplog.at_level(logging.INFO, logger="rayembed"):
        found, expected = [(mine.run(one), score.run(one))[1] for one in (whole, alone)]
    assert cuts[0] == cuts[1]
    assert len(cuts[0]) == 5
    check_round_trip(whole, "mine")
    check_round_trip(whole, "score")
    assert [row for row in read_lines(found) if row.get("type") not in OF_OWN_KIND] == read_lines(expected)
    assert stats(Path(whole.output_dir) / "mine")["dropped"]["denoised"] > 0, "the data must show what is tested"
    figures, figures_alone = stats(found), stats(expected)
    assert figures["passed_through"] == OTHERS
    for name in ("rows", "pairs", "different_pairs", "rows_with_a_positive_on_top"):
        assert figures[name] == figures_alone[name] > 0
    for side in ("positive_scores", "negative_scores"):
        assert figures[side]["quantiles"] == figures_alone[side]["quantiles"]
    told = "69 rows of types sts and class pass through as they are (labels-no_in_batch_neg/words 4, own labels 30, "
    for job in ("mine", "score"):
        assert f"{job}: {told}" in caplog.text
    assert "score: 80 rows of " in score.plan(whole)
    assert "at most 400 pairs, " in score.plan(whole)
    assert "mine: 80 queries against " in mine.plan(whole)
    for job_plan in (score.plan(whole), mine.plan(whole)):
        assert told in job_plan


def test_no_in_batch_neg_and_settings_of_datasets_are_in_force_after_mining(mined: Experiment, make: Make) -> None:
    train = {"global_batch_size": 8}
    entries = [{"name": "found", "weight": 2.5}]
    experiment = make("mined", mine=MINE, train=train)
    data = {**vars(experiment.data), "datasets": entries}
    experiment = type(experiment)(**{**vars(experiment), "data": data})
    rows, _ = training_rows(experiment, after=("mine",))
    found = {
        item.name: (item.type, item.no_in_batch_neg, item.weight) for item in read_datasets(rows, experiment).items
    }
    assert found == {
        "sts": ("sts", False, 1.0),
        "found": (None, False, 2.5),
        "clusters": ("symmetric_clustering", False, 1.0),
        "own pairs": ("sts", False, 1.0),
        "own labels": ("class", False, 1.0),
        "marked-no_in_batch_neg/train": (None, True, 1.0),
        "labels-no_in_batch_neg/words": ("class", True, 1.0),
    }


def test_jobs_that_would_have_nothing_to_do_are_refused(make: Make, tiny_reranker: Path) -> None:
    files = ["sts.jsonl", "labels-no_in_batch_neg"]
    mining = make("none", files=files, mine=MINE)
    scoring = make("none", files=files, score={"model": str(tiny_reranker), "max_len": 64})
    for job, experiment, section in ((mine, mining, "mine"), (check, mining, "mine"), (score, scoring, "score")):
        with pytest.raises(
            ValueError, match=rf"all 9 training rows are of the types sts and class, .* nothing to {section}; "
        ):
            job.run(experiment)


def test_rows_of_retrieval_alone_are_not_copied(make: Make, tmp_path: Path) -> None:
    rows = prepare(make("alone", files=["found.jsonl"]), corpus=False, evaluation=False).rows
    assert rows is not None
    assert retrieval_rows(rows, tmp_path, 7) is rows
    assert not list(tmp_path.iterdir())
