"""The Dockerfiles are right by hadolint and by what it does not look at, and each check finds its mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.shipped import CLUSTER, ROOT, named_secret

HADOLINT = Path(sys.executable).with_name("hadolint")
NAMES = ["Dockerfile.cpu", "Dockerfile.cuda"]
INSTALLED = "uv pip install --constraints constraints.txt --build-constraints constraints.txt --requirements"
SOURCES = "COPY README.md LICENSE ./\nCOPY rayembed rayembed\n"
# What stands in both files, what a mistake makes of it, and the rule of hadolint or the words that tell it.
MISTAKES = [
    ("FROM ubuntu:24.04 AS build", "FROM ubuntu AS build", "DL3006"),
    ("FROM ubuntu:24.04 AS build", "FROM ubuntu:latest AS build", "DL3007"),
    ("USER 1000:1000", "USER root", "DL3002"),
    ("USER 1000:1000\n", "", "the last USER must be a number other than 0"),
    ("USER 1000:1000", "USER ray", "the last USER must be a number other than 0"),
    ("    && rm -rf /var/lib/apt/lists/* \\\n", "", "DL3009"),
    ("install --yes --no-install-recommends ca-certificates g++", "install --yes ca-certificates g++", "DL3015"),
    ("install --yes --no-install-recommends ca-certificates g++", "install ca-certificates g++", "DL3014"),
    ("COPY rayembed rayembed", "ADD rayembed rayembed", "DL3020"),
    ("COPY rayembed rayembed", "ADD https://example.com/rayembed.tar.gz .", "ADD"),
    ("WORKDIR /src", "RUN cd /src", "DL3003"),
    ("WORKDIR /src", "RUN pip install ray", "DL3042"),
    ("WORKDIR /src", "RUN sudo true", "DL3004"),
    ("WORKDIR /src", "WORKDIR src", "DL3000"),
    ("WORKDIR /src", "ENV RAY_AUTH_TOKEN=abc", "a secret"),
    ("    RAY_AUTH_MODE=token", "    HF_TOKEN=abc", "a secret"),
    (INSTALLED, "uv pip install --requirements", "without the pinned versions"),
    ("COPY pyproject.toml cluster", SOURCES + "COPY pyproject.toml cluster", "before the dependencies are installed"),
    ("uv:0.13.9 AS uv", "uv:latest AS uv", "DL3007"),
]


def problems(text: str, file: Path) -> list[str]:
    """What is wrong with a Dockerfile, which is written to `file` for hadolint."""
    file.write_text(text)
    linted = subprocess.run([HADOLINT, "--no-color", file], capture_output=True, text=True, check=False)
    found = linted.stdout.splitlines()
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("the last USER must be a number other than 0: Kubernetes checks no names")
    if re.search(r"^ADD ", text, re.MULTILINE):
        found.append("ADD: write COPY, or fetch and check a sum")
    if any(named_secret(name) for name in re.findall(r"\b([A-Z][A-Z_]*)=", text)):
        found.append("a secret would be written into the image")
    copied, installed = text.find("COPY rayembed"), text.find(" --constraints constraints.txt")
    if installed < 0:
        found.append("dependencies are installed without the pinned versions")
    elif 0 <= copied < installed:
        found.append("sources are copied before the dependencies are installed, and every change installs all of them")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    assert problems((CLUSTER / name).read_text(), tmp_path / "Dockerfile") == []


@pytest.mark.parametrize(("there", "mistake", "words"), MISTAKES, ids=[mistake[2] for mistake in MISTAKES])
def test_a_mistake_is_found(there: str, mistake: str, words: str, tmp_path: Path) -> None:
    text = (CLUSTER / NAMES[0]).read_text()
    assert there in text
    found = problems(text.replace(there, mistake, 1), tmp_path / "Dockerfile")
    assert any(words in problem for problem in found), found


def test_both_images_are_built_alike() -> None:
    """They differ in torch's build and in the last stage's base: a head and its workers have one Python and Ray."""
    cpu, cuda = ((CLUSTER / name).read_text().splitlines() for name in NAMES)
    lines = [{line for line in text if line and not line.startswith("#")} for text in (cpu, cuda)]
    assert lines[0] - lines[1] == {"    UV_TORCH_BACKEND=cpu \\", "FROM ubuntu:24.04"}
    assert {line.split(":")[0] for line in lines[1] - lines[0]} == {"    UV_TORCH_BACKEND=cu130 \\", "FROM nvidia/cuda"}


def test_torch_and_the_compilers_are_of_one_cuda() -> None:
    """DeepSpeed refuses to build with compilers of another major version than torch's."""
    text = (CLUSTER / "Dockerfile.cuda").read_text()
    (torch,) = re.findall(r"UV_TORCH_BACKEND=cu(\d\d)\d", text)
    (compilers,) = re.findall(r"^FROM nvidia/cuda:(\d+)\.\S+-devel-", text, re.MULTILINE)
    assert torch == compilers


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_is_let_through_and_there(name: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"  # nothing gets into an image unless it is named
    let_through = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (CLUSTER / name).read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources == let_through
    assert all((ROOT / source).exists() for source in sources)
