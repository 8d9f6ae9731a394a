"""Experiment files: read with overrides and refused with every problem at once, and written with every default.

PyYAML alone would take the last of two equal keys and a section with nothing under it for "leave this job out"; both
look like typing errors and are refused. It also reads 1e-5 as text, which the config classes turn into a number.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rayembed.config.experiment import Experiment
from rayembed.config.schema import (
    ADAPTER,
    Schema,
    bounds_in_words,
    describe,
    is_list_of_texts,
    sections,
    settings,
    type_in_words,
)
from rayembed.config.uris import public_text, without_keys_within

__all__ = ["ConfigError", "describe", "dump", "load", "nearest"]

COMMAND_LINE = "command line"
BOUND_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short"}
LEAST_LIKENESS = 0.8  # "tempreture" has 0.86 to "temperature"; "report_to", which is no setting, 0.67 to "export"
ELSEWHERE = {  # names of FlagEmbedding's programs, and habits of other trainers, that are spelt otherwise here
    "model_name_or_path": "model.name_or_path",
    "embedder_name_or_path": "mine.model",
    "reranker_name_or_path": "score.model",
    "sentence_pooling_method": "model.pooling",
    "pooling_method": "model.pooling",
    "train_data": "data.train",
    "input_file": "data.train",
    "candidate_pool": "data.corpus",
    "dataset_dir": "data.evaluation",
    "eval_data": "data.evaluation",
    "embedder_query_max_length": "encode.query_max_len",
    "embedder_passage_max_length": "encode.passage_max_len",
    "reranker_max_length": "score.max_len",
    "use_fp16": "encode.dtype",
    "use_bf16": "encode.dtype",
    "devices": "ray.num_workers",
    "nproc_per_node": "ray.num_workers",
    "train_batch_size": "train.global_batch_size",
    "batch_size": "train.per_device_train_batch_size",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_negatives": "mine.negative_number",
    "teacher": "score.model",
    "overwrite_output_dir": "--overwrite",
}


class ConfigError(ValueError):
    """What is wrong with an experiment file or its overrides; one line a problem."""


def load(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, put the overrides over it, and check every setting.

    Args:
        path: YAML file. Relative paths inside it stay relative to the current directory; nothing is expanded.
        overrides: `section.key=value` each, the value in YAML. `mine={}` turns a section on and keeps what the file
            says in it, `mine=null` turns it off. Later ones win.

    Raises:
        ConfigError: Anything is wrong; all unknown keys and refused values are listed, a line each.
    """
    document = _read(path)
    given = [_apply(document, override) for override in overrides]
    return _validated(document, path, given)


def with_values(experiment: Experiment, values: Mapping[str, Any], *, where: str) -> Experiment:
    """The experiment with other values of some settings, checked as `load` checks a file.

    Args:
        experiment: stays as it is.
        values: by dotted keys. A key of a section that is off turns it on, with its defaults.
        where: what the values come from, for errors.

    Raises:
        ConfigError: a key is unknown, or a value is refused, by itself or beside the others.
    """
    document = ADAPTER.dump_python(experiment)
    for key, value in values.items():
        _put(document, key, value, f"{where}: {key}")
    return _validated(document, where, [])


def dump(experiment: Experiment) -> str:
    """Write an experiment as YAML with every default written out; `load` gives an equal one back.

    Keys in URIs (s3://KEY:SECRET@bucket/...) are left out: what is loaded names the same data, and needs the keys from
    the environment or put back by hand.
    """
    document = without_keys_within(ADAPTER.dump_python(experiment, mode="json"))
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def nearest(key: str) -> str | None:
    """The valid key that was most likely meant by an unknown one; None if none is like it.

    A name of FlagEmbedding that we spell otherwise leads to ours; else the name spelt most alike in any section is
    taken, in the same section if two are.
    """
    section, _, name = key.rpartition(".")
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    valid = [*settings(), *filter(None, sections())]

    def likeness(other: str) -> float:
        other_section, _, other_name = other.rpartition(".")
        shortened = set(name.split("_")) < set(other_name.split("_"))  # name, num_epochs
        ratio = difflib.SequenceMatcher(None, name, other_name).ratio()
        return max(ratio, LEAST_LIKENESS * shortened) + 0.1 * (other_section == section)

    best = max(valid, key=likeness)
    return best if likeness(best) >= LEAST_LIKENESS else None


def _validated(document: dict[str, Any], path: str, given: Sequence[str]) -> Experiment:
    for key, schema in settings().items():
        section, _, name = key.rpartition(".")
        holder = document.get(section) if section else document
        if is_list_of_texts(schema) and isinstance(holder, dict) and isinstance(holder.get(name), str):
            holder[name] = [holder[name]]
    try:
        return ADAPTER.validate_python(document)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error.errors(), path, given))) from None


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (in {Path.cwd()}); the experiment file comes first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error}); give a YAML file") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        problems = [f"{path}:{line}: {what}" for line, what in _node_problems(node, "")]
        document = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_mark(error)}") from None
    if document is None:
        raise ConfigError(f"{path}: empty; an experiment needs at least output_dir and model.name_or_path")
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: found {_shown(document)}, must be settings and sections, as in `seed: 42`")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        json.dumps(document, default=str, skipkeys=True)
    except ValueError:
        raise ConfigError(f"{path}: an alias (*name) holds itself; write out what it stands for") from None
    return document


def _node_problems(node: yaml.Node | None, prefix: str, seen: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """Line and text of what only the YAML shows: a key that is there twice, a section with nothing under it."""
    seen = set() if seen is None else seen
    if node is None or id(node) in seen:  # an alias, perhaps to what it is in
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _node_problems(item, f"{prefix}[].", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in first_lines:
            yield line, f"{name}: there already on line {first_lines[name]}; keep one of them"
        first_lines.setdefault(name, line)
        if name in sections() and isinstance(value, yaml.ScalarNode) and value.value == "":
            yield line, f"{name}: nothing under it; write `{name}: {{}}` for its defaults, or leave the line out"
        yield from _node_problems(value, f"{name}.", seen)


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    why = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: not YAML: {why}; check indentation, colons and quotes there"


def _apply(document: dict[str, Any], override: str) -> str:
    """Put one override into the document; returns its key."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not an override; write section.key=value")
    if not text.strip():
        raise ConfigError(
            f"{COMMAND_LINE}: {override} has no value; write {key}=null for none, {key}='\"\"' for no text"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{COMMAND_LINE}: {override}: value is not YAML; quote text: {key}='\"...\"'") from None
    _put(document, key, value, f"{COMMAND_LINE}: {override}")
    return key


def _put(document: dict[str, Any], key: str, value: Any, what: str) -> None:  # noqa: ANN401 - whatever YAML may hold
    """Sets a dotted key; `what` begins the error where something on the way has no keys."""
    holder, way = document, key.split(".")
    for depth, name in enumerate(way[:-1], start=1):
        if holder.get(name) is None:
            holder[name] = {}
        if not isinstance(holder[name], dict):
            whole = ".".join(way[:depth])
            raise ConfigError(
                f"{what}: {whole} is {_shown(holder[name])}, which has no keys; give the whole value: {whole}=..."
            )
        holder[name] = dict(holder[name])  # a YAML alias may share it with another section
        holder = holder[name]
    old = holder.get(way[-1])
    merged = key in sections() and isinstance(old, dict) and isinstance(value, dict)
    holder[way[-1]] = {**old, **value} if merged and old else value


def _problems(errors: list[ErrorDetails], path: str, given: Sequence[str]) -> Iterator[str]:
    """One line a problem, in the order of the settings; a value refused by each of several types is one problem."""
    order = {key: place for place, key in enumerate([*settings(), *sections()])}
    lines: dict[str, str] = {}
    for error in errors:
        key, schema = _locate(error["loc"])
        lines.setdefault(f"{key}{error['msg'] if error['type'] == 'value_error' else ''}", _line(error, key, schema))
    for key in sorted(lines, key=lambda key: order.get(key.partition("[")[0], len(order))):
        from_command_line = any(
            key == other or key.startswith((f"{other}.", f"{other}[")) or other.startswith(f"{key}.") for other in given
        )
        yield f"{COMMAND_LINE if from_command_line else path}: {lines[key]}"


def _locate(location: tuple[int | str, ...]) -> tuple[str, Schema | None]:
    """Dotted key and schema of where pydantic found an error; None for a key that does not exist."""
    key = ""
    for place, part in enumerate(location):
        if key in settings():  # what follows is a place in a list, or which type of several was tried
            items = settings()[key].get("items")
            return (f"{key}[{part}]", items) if items and isinstance(part, int) else (key, settings()[key])
        key = f"{key}.{part}" if place else str(part)
    return key, settings().get(key) or sections().get(key)


def _line(error: ErrorDetails, key: str, schema: Schema | None) -> str:
    kind, found = error["type"], error["input"]
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key in settings() else message
    if kind == "missing":
        words = "a section" if schema is None or key in sections() else type_in_words(schema)
        example = "; at least model.name_or_path" if key == "model" else ""
        return f"{key}: missing, must be {words}{example}"
    if schema is None:
        meant = nearest(key)
        return f"{key}: unknown key" + (
            f"; did you mean {meant}?" if meant else "; `rayembed run --help` lists every key"
        )
    if key in sections():
        none = ", or null to leave it out" if key and "anyOf" in sections()[""]["properties"][key] else ""
        return f"{key}: found {_shown(found)}, must be a section with keys under it{none}"
    type_words, bounds = type_in_words(schema), bounds_in_words(schema)
    if kind in BOUND_ERRORS:
        return f"{key}: found {found if kind != 'too_short' else _shown(found)}, must be {bounds}"
    quote = (
        "; put it in quotes"
        if kind == "string_type" and not isinstance(found, dict | list) and found is not None
        else ""
    )
    return f"{key}: found {_shown(found)}, must be {type_words}{', ' if bounds else ''}{bounds}{quote}"


def _shown(value: object) -> str:
    text = public_text(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."
