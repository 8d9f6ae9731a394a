"""How many workers: one number, or from fewest to most with a batch that any of them can share."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.loading import ConfigError, dump, load
from rayembed.config.ray import RayConfig
from rayembed.config.schema import describe

ELASTIC: dict[str, Any] = {"num_workers": [1, 4], "max_failures": 3}


def experiment(ray: dict[str, Any], train: dict[str, Any] | None, **sections: Any) -> Experiment:  # noqa: ANN401
    return Experiment(
        **{"output_dir": "run", "model": {"name_or_path": "base"}, "ray": ray, "train": train, **sections}
    )


@pytest.mark.parametrize(
    ("given", "fewest", "most", "words"),
    [(3, 3, 3, "3 workers"), ((1, 4), 1, 4, "1 to 4 workers"), ((2, 2), 2, 2, "2 workers")],
)
def test_fewest_and_most(given: Any, fewest: int, most: int, words: str) -> None:  # noqa: ANN401
    found = RayConfig(num_workers=given)
    assert (found.fewest_workers, found.most_workers, found.elastic) == (fewest, most, fewest < most)
    assert found.workers_in_words() == words


def test_a_pair_of_equal_numbers_is_one_number() -> None:
    assert RayConfig(num_workers=(2, 2)) == RayConfig(num_workers=2)


def file(tmp_path: Path, workers: str) -> str:
    path = tmp_path / "e.yaml"
    path.write_text(f"output_dir: x\nmodel: {{name_or_path: m}}\nray: {{num_workers: {workers}, max_failures: 1}}\n")
    return str(path)


def test_it_is_read_from_files_and_the_command_line_and_written(tmp_path: Path) -> None:
    assert load(file(tmp_path, "[1, 4]")).ray.num_workers == (1, 4)
    loaded = load(file(tmp_path, "2"), ["ray.num_workers=[1,4]", "train.global_batch_size=12", "train.grad_cache=true"])
    assert loaded.ray.num_workers == (1, 4)
    (tmp_path / "again.yaml").write_text(dump(loaded))
    assert load(str(tmp_path / "again.yaml")) == loaded


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("[4, 1]", r"ray\.num_workers: found \[4, 1\], must be \[fewest, most\]: write \[1, 4\]"),
        ("[0, 3]", r"ray\.num_workers: found \[0, 3\], must be a whole number or a pair of whole numbers, at least 1"),
        ("[1, 2, 3]", r"ray\.num_workers: found \[1, 2, 3\], must be a whole number or a pair of whole numbers"),
        ("[2]", r"ray\.num_workers: found \[2\], must be a whole number or a pair of whole numbers"),
        ("0", r"ray\.num_workers: found 0, must be at least 1"),
        ("many", r"ray\.num_workers: found \"many\", must be a whole number or a pair of whole numbers"),
    ],
)
def test_what_is_no_number_of_workers_is_refused(tmp_path: Path, workers: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^[^\n]*{message}[^\n]*$"):
        load(file(tmp_path, workers))


def test_help_says_both_forms() -> None:
    (found,) = [setting for setting in describe("ray") if setting.key == "ray.num_workers"]
    assert found[1:4] == ("a whole number or a pair of whole numbers", "1", "at least 1")


RERANKER = {"model": {"name_or_path": "base", "family": "reranker-encoder"}}
OWN = {"negatives_cross_device": False}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {},
        {"per_device_train_batch_size": 7},
        r"does not depend on the number of workers; set .*global_batch_size to 24$",
    ),
    (
        {},
        {"global_batch_size": 32},
        r"is 32, and ray\.num_workers \[1, 4\] needs a multiple of 12, .* it to 36, or ray",
    ),
    (
        {},
        {"global_batch_size": 4},
        r"needs a multiple of 12, which any number of these workers can share; set it to 12, or ray",
    ),
    ({}, {"global_batch_size": 24, **OWN}, r"negatives_cross_device false would give queries more negatives on fewer"),
    ({"max_failures": 0}, {"global_batch_size": 24}, r"ray\.max_failures 0 would end the run when a worker is lost"),
]


@pytest.mark.parametrize(("ray", "train", "message"), REFUSED)
def test_what_would_depend_on_their_number_is_refused(ray: dict[str, Any], train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        experiment({**ELASTIC, **ray}, train)
    assert re.search(message, error.value.errors()[0]["msg"]), error.value


@pytest.mark.parametrize(
    ("train", "sections"),
    [
        ({}, {}),
        ({**OWN, "no_in_batch_neg": True}, {}),
        (OWN, RERANKER),
    ],
)
def test_what_does_not_depend_on_it_is_allowed(train: dict[str, Any], sections: dict[str, Any]) -> None:
    made = experiment(ELASTIC, {"global_batch_size": 24, **train}, **sections)
    assert made.global_batch_size() == 24
    assert made.batch_step() == 12


def test_passes_over_texts_alone_ask_for_no_batch() -> None:
    assert experiment({"num_workers": [1, 4]}, None).ray.elastic


@pytest.mark.parametrize(("workers", "expected"), [(None, 24), (1, 24), (3, 8), (4, 6)])
def test_deepspeed_is_told_of_the_workers_that_there_are(workers: int | None, expected: int) -> None:
    made = experiment(ELASTIC, {"global_batch_size": 24, "gradient_accumulation_steps": 2})
    found = deepspeed_settings(made, workers=workers)
    assert found["train_micro_batch_size_per_gpu"] == expected
    assert found["train_batch_size"] == 48
