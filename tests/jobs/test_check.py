"""The job check refuses before any work what would fail after hours of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.jobs import check
from tests.jobs.conftest import MakeExperiment


def test_it_says_how_much_there_is_and_what_is_cut(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    path = check.run(make_experiment(tmp_path / "run", encode={"passage_max_len": 10}))
    text = path.read_text()
    assert path == tmp_path / "run" / "check.txt"
    assert "0 errors" in text
    assert "longer than 48 (data.passage_max_len) are cut" in text
    assert "100.0 % longer than 10 (encode.passage_max_len) are cut" in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"evaluation": None}, "evaluate": {}}, "set data.evaluation to a BEIR folder"),
        ({"data": {"train": []}, "mine": {}}, "section mine; set data.train"),
        ({"data": {"passage_max_len": 129}}, r"data.passage_max_len is 129, but .* at most 128 tokens"),
        ({"encode": {"query_max_len": 400}}, "encode.query_max_len is 400"),
        ({"mine": {"model": "nowhere/such"}}, "model 'nowhere/such': no checkpoint found"),
        ({"score": {"model": "nowhere/such"}}, "model 'nowhere/such': no checkpoint found"),
        ({"mine": {}, "train": {"knowledge_distillation": True}}, "has no teacher scores; add a section score"),
    ],
)
def test_refused(make_experiment: MakeExperiment, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check.run(make_experiment(tmp_path / "run", **sections))


def test_the_model_may_not_be_the_folder_that_training_replaces(
    make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    made = make_experiment(tmp_path / "run")
    with pytest.raises(ValueError, match="the folder that training replaces"):
        replace(made, model=replace(made.model, name_or_path=str(tmp_path / "run" / "model")))
