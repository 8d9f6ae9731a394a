"""Docstrings are found in source files without importing them."""

import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rayembed.data.docstring_sources import STANDARD_LIBRARY, find_packages, package_versions, read_docstrings

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a source file below a folder that Python imports from."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_source(path: str, source: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)

    return write_source


def names(package: str, dropped: Counter[str] | None = None) -> list[str]:
    places = find_packages([package])[package]
    return [docstring.name for docstring in read_docstrings(package, places, Counter() if dropped is None else dropped)]


def test_names_are_qualified_and_public_and_in_order_of_file_and_line(write: Write) -> None:
    write(
        "fakepack/__init__.py",
        'def top():\n    """Top."""\n    def inner():\n        """Inner."""\n\ndef _hidden():\n    """Hidden."""\n',
    )
    write(
        "fakepack/sub/_private_module.py",
        'class Thing:\n    """Thing."""\n    def method(self):\n        """Method."""\n    def __init__(self):\n'
        '        """Init."""\n\nclass _Hidden:\n    """Hidden."""\n    def method(self):\n        """Method."""\n',
    )
    assert names("fakepack") == [
        "fakepack.top",
        "fakepack.sub._private_module.Thing",
        "fakepack.sub._private_module.Thing.method",
    ]


def test_definitions_under_conditions_count(write: Write) -> None:
    write(
        "fakepack/__init__.py",
        'if True:\n    def a():\n        """A."""\nelse:\n    async def b():\n        """B."""\n'
        'try:\n    import nothing\nexcept ImportError:\n    def c():\n        """C."""\n',
    )
    assert names("fakepack") == ["fakepack.a", "fakepack.b", "fakepack.c"]


def test_test_folders_private_folders_and_copies_are_left_out(write: Write) -> None:
    source = 'def f():\n    """F."""\n'
    for path in ("a.py", "tests/b.py", "_vendor/c.py", "_core/d.py", "test_e.py", "not-a-package/f.py"):
        write(f"fakepack/{path}", source)
    assert names("fakepack") == ["fakepack._core.d.f", "fakepack.a.f"]


def test_a_skipped_module_is_left_out_of_its_own_package_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayembed.data.docstring_sources.SKIPPED_MODULES", {"fakepack.models"})
    write("fakepack/models/a.py", 'def f():\n    """F."""\n')
    write("fakepack/sub/models/a.py", 'def f():\n    """F."""\n')
    assert names("fakepack") == ["fakepack.sub.models.a.f"]


def test_nothing_is_imported_and_broken_files_are_counted(write: Write) -> None:
    write("fakepack/__init__.py", 'raise RuntimeError("imported")\n\ndef f():\n    """F."""\n')
    write("fakepack/broken.py", 'def f(:\n    """F."""\n')
    write("fakepack/zero.py", 'x = """\0"""\n')
    dropped: Counter[str] = Counter()
    assert names("fakepack", dropped) == ["fakepack.f"]
    assert dropped == {"files that are not valid Python": 2}
    assert "fakepack" not in sys.modules


def test_single_file_packages_and_frozen_modules_are_found(write: Write) -> None:
    write("fakesingle.py", 'def f():\n    """F."""\n')
    assert names("fakesingle") == ["fakesingle.f"]
    assert "os.walk" in names("os")
    assert "json.dumps" in names("json")


def test_the_standard_library_is_one_package_without_its_tests() -> None:
    modules = {place.name.removesuffix(".py") for place in find_packages([STANDARD_LIBRARY])[STANDARD_LIBRARY]}
    assert {"json", "argparse", "asyncio"} <= modules
    assert not {"test", "idlelib", "lib2to3"} & modules


def test_the_built_in_list_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayembed.data.docstring_sources.BUILT_IN_PACKAGES", ("yaml", "not_installed_at_all"))
    assert list(find_packages([])) == ["yaml"]


def test_a_named_package_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"harvest\.packages names not_installed_at_all.* install it"):
        find_packages(["json", "not_installed_at_all"])


def test_versions_are_those_of_the_distributions(write: Write) -> None:
    write("fakesingle.py", "")
    versions = package_versions(["yaml", "json", STANDARD_LIBRARY, "fakesingle"])
    assert versions["json"] == versions[STANDARD_LIBRARY] == platform.python_version()
    assert versions["fakesingle"] == "unknown"
    assert versions["yaml"][0].isdigit()
