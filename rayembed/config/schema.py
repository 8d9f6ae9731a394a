"""The settings as data, read from the config classes: every dotted key with its type, default, bounds and help line.

`rayembed JOB --help` and the errors of `load` are written from this, so neither can drift from what is checked.
"""

import dataclasses
import json
from functools import cache
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from rayembed.config.experiment import Experiment

ADAPTER: TypeAdapter[Experiment] = TypeAdapter(Experiment)
Schema = dict[str, Any]
TYPES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a mapping",
    "null": "null",
}
PLURALS = {"text": "texts", "a whole number": "whole numbers", "a number": "numbers", "a mapping": "mappings"}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "greater than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minItems": "at least {} long",
    "minLength": "at least {} long",
    "pattern": "matching {}",
}


class Setting(NamedTuple):
    """One setting, described for a person.

    Attributes:
        key: Dotted, as in `train.learning_rate`.
        type: Type in words, as in "a number or null".
        default: As it is written in YAML, or "required".
        bounds: In words, as in "greater than 0"; empty where any value of the type is allowed.
        help: What it means, on one line.
    """

    key: str
    type: str
    default: str
    bounds: str
    help: str


@cache
def sections() -> dict[str, Schema]:
    """JSON schema of each section by its name; "" is the top level, whose settings are in no section."""
    root = ADAPTER.json_schema()
    found: dict[str, Schema] = {"": root}
    for field in dataclasses.fields(Experiment):
        options = _options(root["properties"][field.name])
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        if reference:
            found[field.name] = root["$defs"][reference.rsplit("/", 1)[1]]
    return found


@cache
def settings() -> dict[str, Schema]:
    """JSON schema of every setting by its dotted key, sections left out, in the order of the classes."""
    found = {}
    for section, schema in sections().items():
        names = [field.name for field in dataclasses.fields(_section_class(section))]
        for name in names if section else [name for name in names if name not in sections()]:
            found[f"{section}.{name}" if section else name] = schema["properties"][name]
    return found


def describe(section: str) -> list[Setting]:
    """Describe the settings of one section, in the order of its class; "" gives those that are in no section.

    Raises:
        ValueError: There is no such section.
    """
    if section not in sections():
        raise ValueError(f"no section {section!r}; sections are {', '.join(filter(None, sections()))}")
    return [
        Setting(key, type_in_words(schema), _default(key), bounds_in_words(schema), _one_line(schema))
        for key, schema in settings().items()
        if key.rpartition(".")[0] == section
    ]


def type_in_words(schema: Schema) -> str:
    """The type of a setting as a person says it: "a whole number or null", "cls, mean or last_token"."""
    return _either([word for option in _options(schema) for word in _types(option)])


def bounds_in_words(schema: Schema) -> str:
    """What is allowed beyond the type: "at least 0, less than 1"; empty if nothing is asked."""
    return ", ".join(
        text.format(option[name])
        for option in _options(schema)
        if "prefixItems" not in option  # of a pair, whose numbers are bounded as one alone is
        for name, text in BOUNDS.items()
        if name in option
    )


def is_list_of_texts(schema: Schema) -> bool:
    """Whether a setting is a list of texts, for which one text alone is understood as well."""
    return bool(schema.get("type") == "array" and schema["items"].get("type") == "string")


def _one_line(schema: Schema) -> str:
    return " ".join(str(schema.get("description", "")).split())


def _options(schema: Schema) -> list[Schema]:
    options: list[Schema] = schema.get("anyOf", [schema])
    return options


def _types(schema: Schema) -> list[str]:
    kind = schema.get("type", "")
    if "enum" in schema or "const" in schema:
        return [str(value) for value in schema.get("enum", [schema.get("const")])]
    if "prefixItems" in schema:
        return [f"a pair of {_plural(schema['prefixItems'][0])}"]
    if kind == "array":
        return [f"a list of {_plural(schema['items'])}"]
    return [TYPES[kind]]


def _plural(schema: Schema) -> str:
    words = type_in_words(schema)
    return PLURALS.get(words, words)


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _section_class(section: str) -> Any:  # noqa: ANN401 (the class is known at run time only)
    """The config class of a section, found through the annotation of its field; "" is the experiment itself."""
    if not section:
        return Experiment
    hint = Experiment.__annotations__[section]
    return next(option for option in getattr(hint, "__args__", (hint,)) if dataclasses.is_dataclass(option))


def _default(key: str) -> str:
    section, _, name = key.rpartition(".")
    field = _section_class(section).__pydantic_fields__[name]
    if field.is_required():
        return "required"
    return json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)
