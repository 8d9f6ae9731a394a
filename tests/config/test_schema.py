"""What `rayembed JOB --help` is written from: complete, in order, and true to what is checked."""

import dataclasses
import typing
from typing import Any

import annotated_types
import pytest
from pydantic import TypeAdapter, ValidationError

from rayembed.config import Experiment
from rayembed.config.schema import Setting, describe, is_list_of_texts, sections, settings

SECTIONS = [name for name in sections() if name]
ALL = [setting for section in sections() for setting in describe(section)]


def section_class(section: str) -> Any:  # noqa: ANN401 (known at run time only)
    hint = typing.get_type_hints(Experiment)[section]
    return next(option for option in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(option))


def test_every_field_of_every_class_is_described_once_and_in_order() -> None:
    expected = [field.name for field in dataclasses.fields(Experiment) if field.name not in SECTIONS]
    for section in SECTIONS:
        expected += [f"{section}.{field.name}" for field in dataclasses.fields(section_class(section))]
    assert [setting.key for setting in ALL] == expected == list(settings())
    assert len(SECTIONS) >= 10


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.key)
def test_every_setting_has_a_help_line_and_a_type(setting: Setting) -> None:
    assert len(setting.help.split()) >= 2, f"{setting.key} needs a docstring under its field"
    assert "\n" not in setting.help
    assert setting.help.endswith((".", ".)"))
    assert setting.type


@pytest.mark.parametrize("section", SECTIONS)
def test_every_bound_of_a_class_is_in_its_description(section: str) -> None:
    words = {
        annotated_types.Gt: "greater than {0.gt}",
        annotated_types.Ge: "at least {0.ge}",
        annotated_types.Lt: "less than {0.lt}",
        annotated_types.Le: "at most {0.le}",
        annotated_types.MinLen: "at least {0.min_length} long",
    }
    described = {setting.key: setting.bounds for setting in describe(section)}
    for field in dataclasses.fields(section_class(section)):
        for bound in getattr(field.default, "metadata", []):
            if type(bound) in words:
                assert words[type(bound)].format(bound) in described[f"{section}.{field.name}"].split(", ")


SCORES = {"mine.min_score", "mine.max_score", "mine.denoise_margin", "mine.denoise_max_score"}  # any number


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.key)
def test_numbers_are_bounded(setting: Setting) -> None:
    if "number" in setting.type and "list" not in setting.type and setting.key not in SCORES:
        assert setting.bounds, f"{setting.key} takes any number; give its field ge, gt, le or lt"


def test_examples_in_words() -> None:
    found = {setting.key: setting for setting in ALL}
    rate = found["train.learning_rate"]
    assert (rate.type, rate.default, rate.bounds) == ("a number", "1e-05", "greater than 0")
    assert found["model.dropout"][1:4] == ("a number or null", "null", "at least 0, less than 1")
    assert found["model.pooling"][1:4] == ("cls, mean, last_token or null", "null", "")
    assert found["evaluate.k_values"][1:4] == ("a list of whole numbers", "[1, 3, 5, 10, 100]", "at least 1 long")
    assert found["export.formats"][1:4] == ("a list of float16 or bfloat16", "[]", "")
    assert found["output_dir"][1:4] == ("text", "required", "")


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_are_those_of_the_class(section: str) -> None:
    """The described defaults, given as values, make the section that no values make."""
    adapter: TypeAdapter[object] = TypeAdapter(section_class(section))
    yaml_defaults = {setting.key: setting.default for setting in describe(section)}
    required: dict[str, object] = {
        key.rpartition(".")[2]: ["x"] if is_list_of_texts(settings()[key]) else "x"
        for key, default in yaml_defaults.items()
        if default == "required"
    }
    stated = {
        key.rpartition(".")[2]: TypeAdapter(object).validate_json(default)
        for key, default in yaml_defaults.items()
        if default != "required"
    }
    assert adapter.validate_python(required) == adapter.validate_python({**required, **stated})
    if required:
        with pytest.raises(ValidationError):
            adapter.validate_python(stated)


def test_lists_of_texts_are_told_from_other_lists() -> None:
    assert is_list_of_texts(settings()["data.train"])
    assert not is_list_of_texts(settings()["evaluate.k_values"])
    assert not is_list_of_texts(settings()["data.evaluation"])


def test_an_unknown_section_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no section 'trian'; sections are model, m3, lora, icl, reranker, data"):
        describe("trian")
