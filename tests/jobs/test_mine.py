"""The job mine against rankings by numpy, and what its result may not depend on; with a real Ray."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.jobs import mine
from rayembed.jobs.units import UnitError
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import rankings
from tests.jobs.toy_data import NUM_TRAIN, read_lines, read_texts

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
    return {path.name: path.read_bytes() for path in folder.glob("part-*.jsonl")}


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
    partial = tmp_path / "run" / "mine.partial"
    shutil.copytree(Path(mined.output_dir) / "mine", partial)
    for name in ("stats.json", "part-00001.jsonl", "done/part-00001.json"):
        (partial / name).unlink()
    kept = partial / "part-00000.jsonl"
    before = kept.stat().st_ino, kept.stat().st_mtime_ns
    final = mine.run(experiment)
    assert files(final) == files(Path(mined.output_dir) / "mine")
    assert (final / "stats.json").read_bytes() == (Path(mined.output_dir) / "mine" / "stats.json").read_bytes()
    status = (final / kept.name).stat()
    assert (status.st_ino, status.st_mtime_ns) == before, "a unit that was done is not done again"
    assert not partial.exists()


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
