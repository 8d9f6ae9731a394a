"""What holds of all files of cluster/: versions agree, the page names each, nothing is open, nothing secret."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from rayembed import __version__
from tests.cluster.shipped import CLUSTER, PINS, RAY, ROOT, keys_written_out

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = ["s3", "qlora", "quickstart"]  # the extras that the Dockerfiles name
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
STARTS_RAY = [path for path in FILES if path.suffix in {".yaml", ".sh"} and path.name != "kuberay-storage.yaml"]
TOKEN = re.compile(r"RAY_AUTH_MODE[:=] ?token|authOptions:\n\s+mode: token")


def names(files: list[Path]) -> list[str]:
    return [path.name for path in files]


def requirements() -> list[Requirement]:
    extras = [text for extra in INSTALLED for text in PROJECT["optional-dependencies"][extra]]
    return [Requirement(text) for text in (*PROJECT["dependencies"], *extras)]


@pytest.mark.parametrize("wanted", requirements(), ids=str)
def test_what_is_pinned_is_what_the_project_allows(wanted: Requirement) -> None:
    assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


def test_the_pinned_versions_need_nothing_that_is_not_pinned() -> None:
    """As far as they are installed here; what CUDA adds is pinned by torch itself."""
    missing, seen, todo = set(), set(), requirements()
    while todo:
        wanted = todo.pop()
        name, key = canonicalize_name(wanted.name), str(wanted)
        if key in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add(key)
        if name not in PINS:
            missing.add(name)
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version.partition("+")[0] == PINS[name]:
            for text in installed.requires or []:
                further = Requirement(text)
                extras = {"", *wanted.extras}
                if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                    todo.append(further)
    assert missing == set()
    assert len(seen) > 50  # it has walked


def test_images_have_a_python_that_the_project_allows() -> None:
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        (version,) = re.findall(r"uv venv --python (\S+)", (CLUSTER / name).read_text())
        assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_all_files_name_the_same_images() -> None:
    found = {path.name: set(re.findall(r"\brayembed:(\S+)", path.read_text())) for path in FILES}
    both = {f"{__version__}-ray{RAY}-cpu", f"{__version__}-ray{RAY}-cu130"}
    assert __version__ == PROJECT["version"]
    for name in ("compose.yaml", "aws.yaml", "gcp.yaml", "kuberay-job.yaml", "kuberay-cluster.yaml", "README.md"):
        assert found[name] == both, name
    assert found["Dockerfile.cpu"] | found["Dockerfile.cuda"] == both


@pytest.mark.parametrize("name", names(FILES))
def test_the_page_names_every_file(name: str) -> None:
    assert name == "README.md" or f"`{name}`" in (CLUSTER / "README.md").read_text()


@pytest.mark.parametrize("path", STARTS_RAY, ids=names(STARTS_RAY))
def test_no_ray_starts_without_a_token(path: Path) -> None:
    assert TOKEN.search(path.read_text())
    assert not re.search(r"RAY_AUTH_MODE[:=] ?\"?disabled|mode: disabled", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_nothing_is_open_to_the_world_and_nothing_secret(path: Path) -> None:
    text = path.read_text()
    assert keys_written_out(text) == []
    assert not re.search(r"NodePort|LoadBalancer|hostPort|hostNetwork", text)
    # Compose's head answers all of its container's addresses, of which loopback alone is published: test_compose.py.
    commands = [line for line in text.splitlines() if "0.0.0.0" in line and not line.lstrip().startswith("#")]
    assert commands == [] or (path.name == "compose.yaml" and "127.0.0.1:8265:8265" in text and len(commands) == 1)


def test_secrets_are_told_from_what_is_none() -> None:
    planted = ["AKIAIOSFODNN7EXAMPLE", "hf_abcdefghijklmnopqrstuvwx", "RAY_AUTH_TOKEN=abc", "BEGIN RSA PRIVATE KEY"]
    assert all(keys_written_out(f"x: {text}") for text in planted)
    assert keys_written_out("RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token\nAWS_ACCESS_KEY_ID:\n") == []


def test_the_package_reads_nothing_of_it() -> None:
    words = re.compile("|".join(re.escape(path.name) for path in FILES if path.name != "README.md"))
    found = [path for path in (ROOT / "rayembed").rglob("*.py") if words.search(path.read_text())]
    assert found == []
