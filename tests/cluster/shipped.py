"""The files of cluster/: where they are, what they hold, what they pin, and copies with a mistake planted."""

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PINS = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines())
    if version
}
RAY = PINS["ray"]
GONE = object()
Keys = Sequence[str | int]

_IMAGE = re.compile(r"(?P<name>[\w./-]+):(?P<rayembed>[\d.]+)-ray(?P<ray>[\d.]+)-(?P<build>cpu|cu\d+)")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|(^|_)KEY(_|$)|ACCESS_KEY")
_NO_SECRET = re.compile(r"_(PATH|FILE|MODE)$")
# What is a key wherever it stands: of AWS, of Hugging Face, a private one, a token given by its value.
_KEYS = re.compile(r"AKIA[0-9A-Z]{12,}|\bhf_[A-Za-z0-9]{16,}|BEGIN [A-Z ]*PRIVATE KEY|RAY_AUTH_TOKEN\s*[=:]\s*[^\s$]")


def load(name: str) -> Any:  # noqa: ANN401 - what YAML may hold
    """A YAML file of cluster/."""
    return yaml.safe_load((CLUSTER / name).read_text())


def planted(document: Any, keys: Keys, value: object) -> Any:  # noqa: ANN401 - what YAML may hold
    """A copy with another value at a place; GONE takes the place away."""
    result = yaml.safe_load(yaml.safe_dump(copy.deepcopy(document)))
    place = result
    for key in keys[:-1]:
        place = place[key]
    if value is GONE:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return result


def image_problems(image: str) -> Iterator[str]:
    """What is wrong with the name of an image: it says which rayembed and which Ray are in it."""
    found = _IMAGE.fullmatch(image)
    if found is None:
        yield f"image {image}: the tag must be VERSION-rayVERSION-BUILD, as in rayembed:0.1.0-ray{RAY}-cpu"
    elif found["ray"] != RAY:
        yield f"image {image}: its Ray is {found['ray']}, and {RAY} is pinned"


def named_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, and not where one is."""
    return bool(_SECRET.search(name)) and not _NO_SECRET.search(name)


def keys_written_out(text: str) -> list[str]:
    """Keys and tokens that stand in a text."""
    return [f"a secret is written out: {match[:8]}..." for match in _KEYS.findall(text)]
