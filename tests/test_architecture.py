"""The layout, checked: who may import whom, which folder owns which library, how long things are, what mirrors what."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).parents[1] / "rayembed"
BASE = {"config"}
PARTS = {"data", "models", "losses", "search", "mining", "evaluation", "tracking", "report"}
MAY_IMPORT = {part: BASE | {part} for part in PARTS} | {
    "config": {"config"},
    "training": BASE | {"training", "data", "models", "losses", "tracking", "search", "evaluation"},
    "jobs": BASE | PARTS | {"training", "jobs"},
    "cli": {"config", "jobs"},
    "__main__": {"cli"},
}
OWNERS = {"ray": {"jobs"}, "deepspeed": {"training"}, "wandb": {"tracking"}, "mlflow": {"tracking"}}
OWNING_FILES = {"deepspeed": {"training/engine.py"}}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TESTS = Path(__file__).parent
ALL_FILES = sorted({*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")})
OF_SOME_SETTINGS = ("gpu", "qlora")  # extras that a setting asks for
OF_NO_PART = {"utils", "util", "common", "helpers", "helper", "misc"}


def unit(path: Path) -> str:
    """The folder, or the single file, directly under rayembed/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            if node.module == "rayembed":
                yield from (f"rayembed.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_folder_rules(path: Path) -> None:
    for module in imported_modules(path):
        library, _, rest = module.partition(".")
        if library == "rayembed":
            assert rest.split(".")[0] in MAY_IMPORT[unit(path)], f"{unit(path)} may not import {module}"
        else:
            assert unit(path) in OWNERS.get(library, {unit(path)}), f"only {OWNERS[library]} may import {library}"
            place = path.relative_to(PACKAGE).as_posix()
            assert place in OWNING_FILES.get(library, {place}), f"only {OWNING_FILES[library]} may import {library}"


@pytest.fixture(scope="module")
def named() -> set[str]:
    """What pyproject.toml installs for rayembed itself: not for tests, and not with something else by chance."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [line for extra in OF_SOME_SETTINGS for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name) for line in [*project["dependencies"], *extras]}


def test_what_is_imported_is_named_in_pyproject(named: set[str]) -> None:
    installed = packages_distributions()
    for path in FILES:
        for module in imported_modules(path):
            library = module.partition(".")[0]
            if library not in {"rayembed", *sys.stdlib_module_names}:
                packages = {canonicalize_name(name) for name in installed.get(library, [library])}
                assert packages & named, f"{path}: name one of {sorted(packages)} in [project.dependencies]"


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_files_and_functions_are_short_and_named_for_what_they_hold(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400, f"{path} is too long: split it by what its parts are about"
    assert path.stem not in OF_NO_PART, f"{path} is named for no part of the work: name it for what it holds"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines < 60, f"{path}:{node.lineno}: {node.name} has {lines} lines, of 59 allowed"


def test_config_loads_neither_torch_nor_ray() -> None:
    modules = ", ".join(f"rayembed.config.{path.stem}" for path in FILES if unit(path) == "config")
    code = f"import sys, {modules}; print(sorted({{'torch', 'ray', 'transformers', 'deepspeed'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def folders(root: Path) -> set[str]:
    """Every folder below that holds Python code of its own."""
    paths = (path for path in root.rglob("*.py") if path.name != "__init__.py")
    return {path.parent.relative_to(root).as_posix() for path in paths}


def test_tests_mirror_the_folders() -> None:
    differing = (folders(TESTS) - {"benchmarks", "cluster"}) ^ folders(PACKAGE)
    assert not differing, f"{sorted(differing)}: each folder of rayembed/ has its tests in the same folder of tests/"
