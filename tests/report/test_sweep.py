"""The sweep on the page: every trial, the best first, and figures that show where it lies."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rayembed.report.sweep import scale_of, sweep_section
from tests.report.test_page import ATTACK, Structure, build

METRIC = "ndcg@10"
KEYS = ["train.temperature", "train.loss_type", "lora.lora_rank"]


def trial(number: int, figure: float | None, values: list[Any], **changed: Any) -> dict[str, Any]:  # noqa: ANN401
    found = {
        **{"number": number, "name": f"name-{number}", **dict(zip(KEYS, values, strict=True))},
        **{METRIC: figure, "step": figure and 4, "steps": 8, "seconds": 61.0, "status": "done"},
        **{"baseline": False, "error": "", "evaluations": [[0, 0.5], [4, figure or 0.4], [8, 0.45]]},
    }
    return found | changed


def write(folder: Path, trials: list[dict[str, Any]]) -> None:
    (folder / "tune").mkdir(parents=True, exist_ok=True)
    found = {"metric": METRIC, "keys": KEYS, "base": 0.5, "trials": trials}
    (folder / "tune" / "sweep.json").write_text(json.dumps(found))


TRIALS = [
    trial(0, 0.61, [None, "info_nce", None], baseline=True),
    trial(1, 0.7, [0.02, "info_nce", 4]),
    trial(2, 0.52, [0.2, ATTACK, 8], status="stopped early"),
    trial(3, None, [0.1, "info_nce", 8], status="failed", error=f"not finite {ATTACK}", evaluations=[]),
]


def test_without_a_sweep_there_is_no_section(tmp_path: Path) -> None:
    assert sweep_section(tmp_path) is None
    write(tmp_path, [])
    assert sweep_section(tmp_path) is None


def test_the_table_has_every_trial_the_best_first(tmp_path: Path) -> None:
    write(tmp_path, TRIALS)
    found = sweep_section(tmp_path)
    assert found is not None
    assert found.columns == ["trial", *KEYS, "nDCG@10", "at step", "steps", "time", "what became of it"]
    assert [row[0] for row in found.rows] == ["1", "0", "2", "3"]
    assert found.rows[0] == ["1", "0.02", "info_nce", "4", "0.7000", "4", "8", "1 min 01 s", "done"]
    assert found.rows[1][1:4] == ["null", "info_nce", "null"]
    assert found.rows[1][-1] == "done: the experiment as it is"
    assert found.rows[3][4:6] == ["–", "–"]  # noqa: RUF001
    assert found.rows[3][-1].startswith("failed: not finite")
    assert found.facts == [
        ("trials", "2 done, 1 stopped early, 1 failed"),
        ("nDCG@10 of the model before training", "0.5000"),
        ("with the experiment as it is", "0.6100"),
        ("best", "0.7000 (+0.0900), trial 1"),
    ]


def test_there_is_a_figure_of_all_keys_one_of_each_and_the_curves(tmp_path: Path) -> None:
    write(tmp_path, TRIALS)
    found = sweep_section(tmp_path)
    assert found is not None
    assert [title for title, _, _ in found.figures] == ["Trials through their values", *KEYS, "Learning curves"]
    curves = str(found.figures[-1][2])
    assert 'aria-label="ndcg@10 over the steps of 3 trials"' in curves
    assert (curves.count("var(--blue)"), curves.count("var(--orange)")) == (1, 1)  # the best, the experiment as it is
    words = str(found.figures[2][2])
    assert ">info_nce<" in words
    ids = [set(re.findall(r' id="([^"]+)"', str(image))) for _, _, image in found.figures]
    assert sum(map(len, ids)) == len(set.union(*ids))


def test_a_sweep_in_which_nothing_was_measured_still_has_its_table(tmp_path: Path) -> None:
    write(tmp_path, TRIALS[3:])
    found = sweep_section(tmp_path)
    assert found is not None
    assert (found.figures, len(found.rows)) == ([], 1)
    write(tmp_path, TRIALS[:1])  # one alone, with keys that are not set
    assert len(sweep_section(tmp_path).figures) == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "logarithmic", "words"),
    [
        ([1e-6, 1e-4], True, []),
        ([0.02, 0.1], False, []),
        ([0, 100], False, []),
        ([-1, 100.0], False, []),
        ([8, None, 512], True, []),
        (["a", "b", "a"], False, ["a", "b"]),
        ([True, False], False, ["yes", "no"]),
        ([1, "auto", None], False, ["1", "auto", "null"]),
        ([None, None], False, ["null"]),
    ],
)
def test_numbers_are_on_an_axis_of_numbers_and_everything_else_on_one_of_words(
    values: list[Any], logarithmic: bool, words: list[str]
) -> None:
    scale = scale_of(values)
    assert scale.logarithmic == logarithmic
    assert [text for _, text in scale.ticks] == words
    assert len(scale.places) == len(values)
    if not words:
        expected = [math.nan if value is None else value for value in values]
        assert scale.places == pytest.approx(expected, nan_ok=True)
    else:
        assert [words[int(place)] for place in scale.places] == [
            words[int(scale.places[i])] for i in range(len(values))
        ]
        assert scale.places[0] == 0


def test_the_report_shows_a_sweep_and_escapes_what_it_tried(run_folder: Path) -> None:
    assert "Learning curves" not in Structure(build(run_folder)).text
    write(run_folder, TRIALS)
    page = build(run_folder)
    structure = Structure(page)
    for text in ("Sweep", "Learning curves", "the test split had no part", "0.7000 (+0.0900), trial 1", ATTACK):
        assert text in structure.text
    assert not structure.tags & {"script", "img"}
