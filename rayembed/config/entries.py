"""Settings that are lists of mappings: read so that an error names the entry and the key."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError, WithJsonSchema


def entries(kind: type[Any]) -> Callable[[object], object]:
    """Reads a list of mappings so that what is wrong is told by place and key, the nearest valid key with it."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    keys = list(kind.__dataclass_fields__)

    def read(value: object) -> object:
        if not isinstance(value, list):
            return value
        found = []
        for place, item in enumerate(value):
            for key in item if isinstance(item, dict) else ():
                if key not in keys:
                    near = get_close_matches(str(key), keys, n=1)
                    meant = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(keys)}"
                    raise ValueError(f"entry {place + 1} has the unknown key {key}; {meant}")
            try:
                found.append(adapter.validate_python(item))
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, first["loc"][:1])) or "entry"
                raise ValueError(f"entry {place + 1}: {key}: {first['msg']}, found {first['input']!r}") from None
        return found

    return read


MAPPINGS = WithJsonSchema({"type": "array", "items": {"type": "object"}})
