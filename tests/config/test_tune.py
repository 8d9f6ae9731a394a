"""The section tune: spaces that can be written, what is drawn from them, and every mistake refused before a start."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.config.loading import ConfigError, dump, load, with_values
from rayembed.config.space import all_points, parse_space, random_point
from rayembed.config.trials import MOST_CHECKED, baseline, check_space, points_to_check, with_point
from rayembed.config.tune import TuneConfig

SPACE: dict[str, Any] = {
    "train.temperature": {"loguniform": [0.01, 0.1]},
    "train.learning_rate": {"uniform": [1e-6, 1e-4]},
    "train.weight_decay": {"quniform": [0.0, 0.3, 0.1]},
    "data.train_group_size": {"randint": [2, 4]},
    "train.knowledge_distillation": {"choice": [True, False]},
    "train.kd_loss_type": {"grid": ["kl_div", "margin_mse"], "when": {"train.knowledge_distillation": True}},
}


def experiment(tune: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Experiment:
    data = {"train": ["rows.jsonl"], "evaluation": "beir", **sections.pop("data", {})}
    settings: dict[str, Any] = {"train": {}, **sections, "data": data, "tune": tune or {"space": SPACE}}
    return Experiment(
        output_dir="runs/x", model={"name_or_path": "some/model", **settings.pop("model", {})}, **settings
    )


def refusal(made: Experiment) -> str:
    with pytest.raises(ConfigError) as error:
        check_space(made)
    return str(error.value)


def test_a_point_holds_every_key_whose_condition_holds_within_its_bounds() -> None:
    dimensions = parse_space(SPACE)
    points = [random_point(dimensions, 1, number) for number in range(300)]
    for point in points:
        assert 0.01 <= point["train.temperature"] <= 0.1
        assert 1e-6 <= point["train.learning_rate"] <= 1e-4
        assert ("train.kd_loss_type" in point) == point["train.knowledge_distillation"]
    found = {key: {point[key] for point in points if key in point} for key in SPACE}
    assert found["train.weight_decay"] == {0.0, 0.1, 0.2, 0.3}  # as they are written, not 0.30000000000000004
    assert found["data.train_group_size"] == {2, 3, 4}
    assert found["train.kd_loss_type"] == {"kl_div", "margin_mse"}
    assert len(found["train.temperature"]) > 250


def test_a_logarithmic_range_has_as_much_below_its_geometric_mean_as_above() -> None:
    dimensions = parse_space({"train.temperature": {"loguniform": [1e-4, 1.0]}})
    drawn = [random_point(dimensions, 0, number)["train.temperature"] for number in range(400)]
    assert 160 < sum(value < 1e-2 for value in drawn) < 240
    assert all(len(f"{value:e}".partition("e")[0].rstrip("0")) <= len("1.234") for value in drawn)


def test_what_is_drawn_is_a_function_of_seed_and_number_and_of_no_other_key() -> None:
    whole, part = parse_space(SPACE), parse_space({"train.temperature": SPACE["train.temperature"]})
    random.seed(3)
    first = random_point(whole, 7, 4)
    random.seed(4)
    assert random_point(whole, 7, 4) == first
    assert random_point(part, 7, 4)["train.temperature"] == first["train.temperature"]
    assert random_point(whole, 8, 4) != first
    assert random_point(whole, 7, 5) != first


def test_all_points_are_every_combination_of_choices_once_the_last_key_fastest() -> None:
    dimensions = parse_space(
        {
            "a.a": {"choice": [1, 2]},
            "a.b": [{"choice": ["x", "y"], "when": {"a.a": 1}}, {"choice": ["z"]}],
            "a.c": {"choice": [5, 6], "when": {"a.b": ["y", "z"]}},
        }
    )
    assert list(all_points(dimensions)) == [
        {"a.a": 1, "a.b": "x"},
        {"a.a": 1, "a.b": "y", "a.c": 5},
        {"a.a": 1, "a.b": "y", "a.c": 6},
        {"a.a": 2, "a.b": "z", "a.c": 5},
        {"a.a": 2, "a.b": "z", "a.c": 6},
    ]


def test_of_entries_of_a_key_the_first_that_holds_counts_and_without_one_the_key_is_left_as_it_is() -> None:
    space = {
        "lora": {"choice": [None, {"lora_rank": 4}]},
        "train.learning_rate": [{"choice": [1e-4], "when": {"lora": {"lora_rank": 4}}}],
    }
    assert list(all_points(parse_space(space))) == [
        {"lora": None},
        {"lora": {"lora_rank": 4}, "train.learning_rate": 1e-4},
    ]


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(
        "output_dir: x\nmodel: {name_or_path: a/b}\ntrain: {}\ndata: {train: [r.jsonl], evaluation: beir}\n"
        "tune: {space: {train.learning_rate: {loguniform: [1e-6, 1e-4]}, train.temperature: {choice: [1e-2, 0.1]}}}\n"
    )
    loaded = load(str(file))
    assert loaded.tune is not None
    assert [dimension.values for dimension in loaded.tune.dimensions()] == [(1e-6, 1e-4), (1e-2, 0.1)]
    file.write_text(dump(loaded))
    assert load(str(file)) == loaded


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"a.a": 3}, "a.a is 3, must be {choice"),
        ({"a.a": []}, "a.a has an empty list"),
        ({"a.a": {}}, "a.a has the keys none, must be {choice"),
        ({"a.a": {"choice": [1], "uniform": [1, 2]}}, "a.a has the keys choice, uniform, must be"),
        ({"a.a": {"choise": [1]}}, "a.a has the keys choise, must be {choice"),
        ({"train": {"temperature": {"choice": [1]}}}, "a key is written in one piece, as in train.temperature"),
        ({"a.a": {"choice": []}}, r"a.a: choice is \[\], must be a list of values"),
        ({"a.a": {"choice": [1, 2, 1]}}, "each once"),
        ({"a.a": {"choice": "bert"}}, "a.a: choice is 'bert', must be a list"),
        ({"a.a": {"uniform": [1]}}, r"a.a: uniform is \[1\], must be a list of 2 numbers"),
        ({"a.a": {"uniform": [1, "x"]}}, "must be a list of 2 numbers"),
        ({"a.a": {"uniform": [True, 2]}}, "must be a list of 2 numbers"),
        ({"a.a": {"uniform": [0, math.inf]}}, "must be a list of 2 numbers"),
        ({"a.a": {"uniform": [2, 1]}}, "its first number must be below its second"),
        ({"a.a": {"loguniform": [0, 1]}}, "must be greater than 0"),
        ({"a.a": {"quniform": [0, 1, 2]}}, "its step must be greater than 0 and fit"),
        ({"a.a": {"quniform": [0, 1, 0]}}, "its step must be greater than 0 and fit"),
        ({"a.a": {"randint": [1, 2.5]}}, "must be two whole numbers"),
        ({"a.a": [{"choice": [1]}, {"choice": [2]}]}, "a.a, entry 1, has no `when`"),
        ({"a.a": {"choice": [1], "when": 3}}, "`when` is 3, must be a mapping"),
        ({"a.a": {"choice": [1], "when": {"a.b": 1}}}, "names a.b, which is no key of tune.space before it"),
        ({"a.a": {"uniform": [1, 2]}, "a.b": {"choice": [1], "when": {"a.a": 1}}}, "names a.a, which is a range"),
        ({"a.a": {"choice": [1, 2]}, "a.b": {"choice": [1], "when": {"a.a": 3}}}, "asks that a.a is 3, which it never"),
    ],
)
def test_spaces_that_cannot_be_meant_are_refused_by_key(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_space(space)
    with pytest.raises(ValueError, match=r"tune\.space: "):
        TuneConfig(space=space)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "loss"}, "losses of two temperatures, group sizes or loss types are on different scales"),
        ({"metric": "eval_loss"}, "different scales"),
        ({"metric": "accuracy"}, "must be ndcg, map, recall, precision or mrr at a number"),
        ({"metric": "ndcg@0"}, "must be ndcg, map"),
        ({"search": "grid"}, r"tune.space has a loguniform for train\.temperature; list its values"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig(space=SPACE, **settings)


def test_a_space_that_fits_is_accepted() -> None:
    check_space(experiment())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.tempreture", "tune.space: train.tempreture: unknown key; did you mean train.temperature?"),
        ("lr", "tune.space: lr: unknown key; did you mean train.learning_rate?"),
        ("train.deepspeeed.x", "unknown key"),
        ("output_dir", "output_dir cannot be tried: every trial has a folder of its own"),
        ("ray.num_workers", "ray.num_workers cannot be tried: it says where a trial runs"),
        ("evaluate.k_values", "evaluate.k_values cannot be tried: it is no part of a trial"),
        ("train.eval_steps", "train.eval_steps cannot be tried: trials are compared by it"),
        ("tune.metric", "tune.metric cannot be tried"),
        ("mine.rounds", "mine.rounds cannot be tried"),
    ],
)
def test_keys_that_are_none_are_refused(key: str, message: str) -> None:
    assert message in refusal(experiment({"space": {key: {"choice": [1, 2]}}}))


def test_keys_of_sections_of_mappings_and_whole_sections_can_be_tried() -> None:
    space: dict[str, Any] = {
        "seed": {"choice": [1, 2]},
        "mine": {"choice": [None, {"negative_number": 3}]},
        "train.deepspeed.zero_optimization.stage": {"choice": [0, 1]},
    }
    made = experiment({"space": space})
    check_space(made)
    last = list(all_points(parse_space(space)))[-1]
    tried = with_point(made, last)
    assert tried.train is not None
    assert tried.mine is not None
    assert (tried.seed, tried.mine.negative_number, tried.tune) == (2, 3, None)
    assert tried.train.deepspeed == {"zero_optimization": {"stage": 1}}


def test_a_value_that_the_experiment_refuses_is_named_with_its_point() -> None:
    found = refusal(experiment({"space": {"train.temperature": {"uniform": [-0.5, 0.1]}}}))
    assert found.splitlines()[0] == (
        "tune.space at train.temperature=-0.5: train.temperature: found -0.5, must be greater than 0"
    )
    found = refusal(experiment({"space": {"train.bf16": {"choice": ["maybe"]}}}))
    assert 'train.bf16: found "maybe", must be true or false' in found


def test_values_that_exclude_each_other_are_refused_and_a_condition_mends_it() -> None:
    space: dict[str, Any] = {"train.sub_batch_size": {"choice": [None, 4]}, "train.tokens_per_chunk": {"choice": [64]}}
    found = refusal(experiment({"space": space}))
    assert found.startswith("tune.space at train.sub_batch_size=4, train.tokens_per_chunk=64: ")
    assert "both say how large a chunk is" in found
    space["train.tokens_per_chunk"]["when"] = {"train.sub_batch_size": None}
    check_space(experiment({"space": space}))


def test_of_a_space_too_large_for_all_combinations_each_value_is_still_read() -> None:
    space: dict[str, Any] = {f"train.{key}": {"uniform": [0.1, 0.2]} for key in ("adam_beta1", "adam_beta2")}
    space |= {f"train.{key}": {"uniform": [0.1, 0.2]} for key in ("weight_decay", "max_grad_norm", "temperature")}
    space |= {f"mine.{key}": {"randint": [1, 9]} for key in ("negative_number", "audit_queries", "denoise_candidates")}
    space |= {"data.query_max_len": {"choice": [8, 16]}, "seed": {"choice": [1, 2]}}
    space["data.passage_max_len"] = {"choice": [8, 16, 1]}
    dimensions = parse_space(space)
    assert len(list(points_to_check(dimensions, 0))) > MOST_CHECKED
    assert "data.passage_max_len: found 1, must be at least 4" in refusal(experiment({"space": space}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tune": {"space": {}}}, "tune.space is empty"),
        ({"data": {"evaluation": None}}, "compares trials on the dev split of data.evaluation, which is null"),
        ({"data": {"dev_split": "test"}}, "data.dev_split and data.evaluation_split are both 'test'"),
        ({"model": {"family": "reranker-encoder"}}, "a reranker-encoder has none of"),
        ({"mine": {"rounds": 2}}, "mine.rounds is 2, and a sweep is of one training"),
    ],
)
def test_experiments_that_cannot_be_swept_are_refused(sections: dict[str, Any], message: str) -> None:
    tune = sections.pop("tune", {"space": {"seed": {"choice": [1]}}})
    assert message in refusal(experiment(tune, **sections))


def test_keys_of_uris_are_refused_because_values_are_written() -> None:
    found = refusal(experiment({"space": {"data.corpus": {"choice": [["s3://KEY:SECRET@bucket/c"], ["c"]]}}}))
    assert "give keys by the environment" in found
    assert "SECRET" not in found


def test_without_sections_train_or_tune_there_is_no_sweep() -> None:
    made = experiment()
    assert "no section train" in refusal(with_values(made, {"train": None}, where="test"))
    assert "no section tune" in refusal(with_values(made, {"tune": None}, where="test"))


def test_the_baseline_is_the_experiment_s_own_values() -> None:
    made = experiment({"space": {**SPACE, "lora.lora_rank": {"choice": [4]}}}, train={"weight_decay": 0.25})
    assert baseline(made) == {
        "train.temperature": None,
        "train.learning_rate": 1e-5,
        "train.weight_decay": 0.25,
        "data.train_group_size": 8,
        "train.knowledge_distillation": False,
        "lora.lora_rank": None,
    }


def test_other_values_leave_the_experiment_as_it_is_and_are_checked_as_a_file_s() -> None:
    made = experiment()
    other = with_values(made, {"train.learning_rate": 0.5, "data.corpus": "c.jsonl", "score.model": "t"}, where="here")
    assert other.train is not None
    assert made.train is not None
    assert (other.train.learning_rate, other.data.corpus) == (0.5, ["c.jsonl"])
    assert (made.train.learning_rate, made.data.corpus, made.score) == (1e-5, [], None)
    with pytest.raises(ConfigError, match=r"^here: train\.lr: unknown key"):
        with_values(made, {"train.lr": 1}, where="here")
    with pytest.raises(ConfigError, match=r"^here: seed\.x: seed is 42, which has no keys"):
        with_values(made, {"seed.x": 1}, where="here")
