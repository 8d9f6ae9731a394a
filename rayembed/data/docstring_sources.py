"""The docstrings of installed packages, read from their source files.

Nothing is imported: importing torch, transformers and ray costs more time than parsing them, runs their code, and
hides docstrings behind decorators. Definitions that are written in C have no source here and are not found.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import platform
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STANDARD_LIBRARY = "stdlib"

# What an installation of rayembed always brings along, so that every machine harvests the same set.
BUILT_IN_PACKAGES = (
    STANDARD_LIBRARY,
    "deepspeed",
    "faiss",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "pydantic",
    "ray",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "torch",
    "transformers",
    "yaml",
)

# Tests and copies of other projects. Private folders are skipped as well (see `_is_skipped`), private modules are not.
SKIPPED_FOLDERS = frozenset(
    "cloudpickle extern externals idlelib lib2to3 test testing tests third_party thirdparty_files turtledemo".split()
)

# numpy defines its public functions there.
READ_PRIVATE_FOLDERS = frozenset({"_core"})

# Some 400 folders of near-copies of each other: a query would have as many right answers as models have copied it.
SKIPPED_MODULES = frozenset({"transformers.models"})

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Docstring:
    """A docstring as it is written in the source, and where it is from."""

    name: str
    """Qualified: module.Class.method."""

    module: str
    """Dotted name of the module that defines it."""

    package: str
    """Top-level package, or `stdlib`."""

    text: str
    """The literal, indentation included."""


def find_packages(names: Sequence[str]) -> dict[str, list[Path]]:
    """Where the sources of packages lie, without importing them.

    Args:
        names: top-level packages, `stdlib` for the whole standard library. Empty: the built-in list, of which packages
            that are not installed are left out.

    Returns:
        Package to its folders and single-file modules, sorted by package.

    Raises:
        ValueError: a package of `names` is not installed or has no Python source.
    """
    found = {name: _locate(name) for name in sorted(set(names or BUILT_IN_PACKAGES))}
    missing = [name for name, places in found.items() if not places]
    if names and missing:
        raise ValueError(
            f"harvest.packages names {', '.join(missing)}, of which no Python source is installed here; "
            f"install it, take it out of harvest.packages, or write {STANDARD_LIBRARY} for the standard library"
        )
    return {name: places for name, places in found.items() if places}


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Installed version of each top-level package; `unknown` where no distribution claims it."""
    distributions = importlib.metadata.packages_distributions()
    versions = {}
    for name in names:
        if name == STANDARD_LIBRARY or name in sys.stdlib_module_names:
            versions[name] = platform.python_version()
        else:
            owners = sorted(set(distributions.get(name, ())))
            versions[name] = ", ".join(importlib.metadata.version(owner) for owner in owners) or "unknown"
    return versions


def read_docstrings(package: str, places: Sequence[Path], dropped: Counter[str]) -> Iterator[Docstring]:
    """Docstrings of the public functions, classes and methods below `places`, in order of file and line.

    Args:
        package: what the docstrings are counted under.
        places: package folders and single-file modules.
        dropped: gets a count of the files that are not valid Python (templates, other versions of the language).
    """
    for place in places:
        for path in sorted(_source_files(place)):
            module = ".".join(path.relative_to(place.parent).with_suffix("").parts).removesuffix(".__init__")
            source = path.read_bytes()
            if b'"""' not in source and b"'''" not in source:
                continue  # parsing is what takes the time; a docstring with a body has triple quotes
            tree = _parse(source)
            if tree is None:
                dropped["files that are not valid Python"] += 1
                continue
            for name, text in _documented(tree.body, module):
                yield Docstring(name, module, package, text)


def _locate(name: str) -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    if name == STANDARD_LIBRARY:
        public = (module for module in sorted(sys.stdlib_module_names) if not module.startswith("_"))
        return [place for module in public if module not in SKIPPED_FOLDERS for place in _in_library(library, module)]
    if name in sys.stdlib_module_names:  # find_spec calls some of them built-in or frozen and gives no path
        return _in_library(library, name)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _in_library(library: Path, module: str) -> list[Path]:
    return [place for place in (library / module, library / f"{module}.py") if place.exists()][:1]


def _source_files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for path in place.iterdir():
        if path.is_dir():
            if not _is_skipped(path):
                yield from _source_files(path)
        elif path.suffix == ".py" and not path.name.startswith("test_"):
            yield path


def _is_skipped(folder: Path) -> bool:
    name = folder.name
    return (
        not name.isidentifier()
        or name in SKIPPED_FOLDERS
        or (name.startswith("_") and name not in READ_PRIVATE_FOLDERS)
        or f"{folder.parent.name}.{name}" in SKIPPED_MODULES
    )


def _parse(source: bytes) -> ast.Module | None:
    collecting = gc.isenabled()
    gc.disable()  # collections while a tree grows find nothing and double the time: 31 s to 17 s for 120 MB of source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return None
    finally:
        if collecting:
            gc.enable()


def _documented(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public definitions, also of those under if and try."""
    for node in body:
        if isinstance(node, Definition):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            text = ast.get_docstring(node, clean=False)
            if text:
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from _documented(node.body, name)
        elif isinstance(node, ast.If | ast.Try):
            yield from _documented(node.body, prefix)
            yield from _documented(node.orelse, prefix)
            for handler in getattr(node, "handlers", ()):
                yield from _documented(handler.body, prefix)
