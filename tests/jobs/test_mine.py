"""The job mine against rankings by numpy, and what its result may not depend on; with a real Ray."""

import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.jobs import mine
from rayembed.jobs.mined_rows import RowWorker
from rayembed.jobs.units import UnitError
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import rankings
from tests.jobs.toy_data import NUM_TRAIN, read_lines, read_texts
from tests.jobs.without_ray import do_units_here

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
FIRST, LAST, NUMBER = 0, 12, 11


@pytest.fixture(scope="module")
def mined(make_experiment: MakeExperiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Mined on one worker."""
    experiment = make_experiment(tmp_path_factory.mktemp("mine") / "run", mine=settings())
    mine.run(experiment)
    return experiment


@pytest.fixture(scope="module")
def ranked(beir: Path, tiny_model: Path) -> dict[str, list[str]]:
    return rankings(tiny_model, read_texts(beir / "queries.jsonl"), read_texts(beir / "corpus.jsonl"), (24, 48))


def settings() -> dict[str, Any]:
    return {"range_for_sampling": f"{FIRST}-{LAST}", "negative_number": NUMBER}


def files(folder: Path) -> dict[str, bytes]:
    """Everything that mining gives."""
    paths = [*folder.glob("part-*.jsonl"), folder / "stats.json", folder / "audit.html"]
    return {path.name: path.read_bytes() for path in paths}


def copied(make_experiment: MakeExperiment, mined: Experiment, output_dir: Path, **sections: Any) -> Experiment:  # noqa: ANN401
    """The same experiment in another run folder that has the vectors and rankings of the first."""
    shutil.copytree(Path(mined.output_dir) / "cache", output_dir / "cache")
    return make_experiment(output_dir, mine=settings(), **sections)


def allowed(row: dict[str, Any], window: list[str], passages: dict[str, str]) -> tuple[list[str], Counter[str]]:
    """Passages of the window that may be negatives, and why the others may not, by the rules alone."""
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for name in window:
        if name in row["pos_ids"]:
            dropped["positive_id"] += 1
        elif passages[name] in row["pos"]:
            dropped["positive_text"] += 1
        elif passages[name].endswith(tuple(f" {text}" for text in row["pos"])):
            dropped["positive_after_title"] += 1
        elif passages[name] == row["query"]:
            dropped["query_text"] += 1
        elif passages[name] in [passages[other] for other in kept]:
            dropped["repeated_text"] += 1
        else:
            kept.append(name)
    return kept, dropped


def test_negatives_are_those_of_the_window_and_the_rest_is_counted(
    mined: Experiment, ranked: dict[str, list[str]], beir: Path
) -> None:
    passages = read_texts(beir / "corpus.jsonl")
    rows = read_lines(Path(mined.output_dir) / "mine")
    filled, dropped = 0, Counter[str]()
    for row in rows:
        inside, why = allowed(row, ranked[row["query_id"]][FIRST:LAST], passages)
        dropped += why
        drawn = [name for name in row["neg_ids"] if name in inside]
        assert len(drawn) == min(NUMBER, len(inside)), "all of the window, where it holds too few"
        assert drawn == sorted(drawn, key=inside.index) == row["neg_ids"][: len(drawn)], "by rank, before the fill-up"
        filled += NUMBER - len(drawn)
        assert [passages[name] for name in row["neg_ids"]] == row["neg"]
        assert len(set(row["neg"])) == len(row["neg"]) == NUMBER
        assert not {*row["neg"]} & {*row["pos"], row["query"]}
    assert len(rows) == NUM_TRAIN
    stats = json.loads((Path(mined.output_dir) / "mine" / "stats.json").read_text())
    assert filled > 0, "the data must show what is tested"
    assert {"positive_id", "positive_text", "query_text"} <= dropped.keys(), "the data must show what is tested"
    assert stats["dropped"] == dict(dropped)
    assert (stats["filled_up"], stats["short_by"], stats["queries"]) == (filled, 0, NUM_TRAIN)
    assert stats["negatives"] == NUM_TRAIN * NUMBER


def test_rows_keep_their_positives(mined: Experiment, beir: Path) -> None:
    passages = read_texts(beir / "corpus.jsonl")
    rows = {row["query_id"]: row for row in read_lines(Path(mined.output_dir) / "mine")}
    assert rows["q010"]["pos_ids"] == ["p010", "p011"], "both positives"
    assert all(row["pos"] == [passages[name] for name in row["pos_ids"]] for row in rows.values())
    assert {name: row["query"] for name, row in rows.items()} == dict(
        list(read_texts(beir / "queries.jsonl").items())[:NUM_TRAIN]
    )


def test_every_positive_has_a_score(mined: Experiment, ranked: dict[str, list[str]]) -> None:
    folder = Path(mined.output_dir) / "mine"
    rows, stats = read_lines(folder), json.loads((folder / "stats.json").read_text())
    assert stats["positives"] == sum(len(row["pos"]) for row in rows)
    assert stats["positives_without_score"] == 0, "also of those that are not among the ranked passages"
    outside = sum(len({*row["pos_ids"]} - {*ranked[row["query_id"]][:LAST]}) for row in rows)
    assert outside > 0, "the data must show what is tested"


def test_the_audit_shows_twenty_rows_and_what_was_counted(mined: Experiment) -> None:
    folder = Path(mined.output_dir) / "mine"
    page, rows = (folder / "audit.html").read_text(), read_lines(folder)
    stats = json.loads((folder / "stats.json").read_text())
    examples = page[page.index("<h2>Examples at random") : page.index("<h2>All counts")]
    assert sum(f"<summary><b>{row['query']}</b>" in examples for row in rows) == 20
    assert examples.count("<dt>filled up, score ") + examples.count("<dt>rank ") == 20 * NUMBER
    assert (
        f"{stats['negatives']:,} negatives for {NUM_TRAIN} queries, from ranks 0 to {LAST - 1} of 120 passages" in page
    )
    assert f"Of {stats['negatives'] - stats['filled_up']:,} negatives from the window" in page
    assert f"negatives and {stats['positives']:,} positives" in page
    assert f"{stats['suspected_by_score']:,} of {stats['compared_pairs']:,} pairs" in page
    often = Counter(name for row in rows for name in row["neg_ids"])
    assert stats["uses"]["most"] == max(often.values())
    assert stats["uses"]["passages"] == len(often)
    name, count = min(often.items(), key=lambda item: (-item[1], item[0]))
    used = page[page.index("<h2>Most used negatives") : page.index("<h2>Examples at random")]
    assert used.index(f'<td class="number">{count}</td>') < used.index(name)
    assert used.count("<tr><td") == 20


def test_positives_of_other_rows_and_bare_texts_are_no_negatives(
    make_experiment: MakeExperiment, beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of everything that is ranked, only what no row of the query has as a positive is left."""
    corpus = {row["_id"]: row for row in read_lines(beir / "corpus.jsonl")}
    passages = read_texts(beir / "corpus.jsonl")
    assert corpus["p012"]["title"], "the data must show what is tested"
    rows = [
        {"query": "one query", "pos": [corpus["p012"]["text"]], "neg": [passages["p020"], "from elsewhere"]},
        *({"query": f"query {i}", "pos": [passages[f"p{i:03d}"]], "neg": []} for i in range(20, 60)),
        {"query": " one  query", "pos": [passages["p015"]], "neg": [passages["p021"]]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    everything = {"range_for_sampling": "0-120", "negative_number": 120, "fill_up": False}
    experiment = make_experiment(tmp_path / "run", data={"train": [str(file)]}, mine=everything)
    with caplog.at_level(logging.WARNING):
        folder = mine.run(experiment)
    found, stats = read_lines(folder), json.loads((folder / "stats.json").read_text())
    for row in (found[0], found[-1]):
        assert {*passages.values()} - {*row["neg"]} == {passages["p012"], passages["p015"]}
    assert [row["pos"] for row in found] == [row["pos"] for row in rows], "the rows keep their own positives alone"
    assert stats["dropped"]["positive_after_title"] == 2
    assert stats["given_negatives_replaced"] == 3
    assert "3 negatives that the rows brought are replaced" in caplog.text


def test_two_workers_give_the_same_bytes(mined: Experiment, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path / "run", mine=settings(), ray={"num_workers": 2})
    assert files(mine.run(experiment)) == files(Path(mined.output_dir) / "mine")


def test_another_seed_draws_other_negatives(mined: Experiment, make_experiment: MakeExperiment, tmp_path: Path) -> None:
    experiment = replace(copied(make_experiment, mined, tmp_path / "run"), seed=43)
    rows, others = read_lines(Path(mined.output_dir) / "mine"), read_lines(mine.run(experiment))
    assert [row["pos"] for row in rows] == [row["pos"] for row in others]
    different = sum(row["neg_ids"] != other["neg_ids"] for row, other in zip(rows, others, strict=True))
    assert different > len(rows) / 4


def test_an_interrupted_run_does_what_is_left(
    mined: Experiment, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    experiment = copied(make_experiment, mined, tmp_path / "run")
    own = RowWorker.__call__

    def dying(self: RowWorker, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        if spec["part"] == 1:
            raise OSError("the disk is full")
        return own(self, spec, name, folder)

    with pytest.MonkeyPatch.context() as patch:
        do_units_here(patch)
        patch.setattr(RowWorker, "__call__", dying)
        with pytest.raises(UnitError, match="the disk is full"):
            mine.run(experiment)
    kept = tmp_path / "run" / "mine.partial" / "part-00000.jsonl"
    before = kept.stat().st_ino, kept.stat().st_mtime_ns
    final = mine.run(experiment)
    assert files(final) == files(Path(mined.output_dir) / "mine")
    status = (final / kept.name).stat()
    assert (status.st_ino, status.st_mtime_ns) == before, "a unit that was done is not done again"
    assert not kept.parent.exists()


def test_a_model_that_cannot_be_read_is_one_error_and_no_result(
    make_experiment: MakeExperiment, tmp_path: Path, tiny_model: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    experiment = make_experiment(tmp_path / "run", mine=settings(), model={"name_or_path": str(broken)})
    with pytest.raises(UnitError, match="encode queries"):
        mine.run(experiment)
    assert not (tmp_path / "run" / "mine").exists()
