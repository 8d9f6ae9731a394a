"""What the pages share: templates that escape every text, and counts as tables."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rayembed.report import wording

Table = tuple[str, list[tuple[str, str]]]


def render(template: str, content: dict[str, Any]) -> str:
    """Page of a template of this folder; texts are escaped, a name that it wants and `content` lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def counts_tables(stats: dict[str, Any] | None) -> list[Table] | None:
    """A stats file as tables (title, rows): its plain values first, then one table for each dict in it.

    Returns:
        None if there is no file. Dicts inside dicts are written as JSON.
    """
    if stats is None:
        return None
    plain = {key: value for key, value in stats.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in stats.items() if isinstance(value, dict)}
    groups = ([("", plain)] if plain else []) + [(wording.title_of(key), group) for key, group in nested.items()]
    return [
        (title, [(wording.title_of(key), wording.quantity(value)) for key, value in group.items()])
        for title, group in groups
    ]
