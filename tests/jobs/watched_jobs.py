"""Command lines of `rayembed`, one after the other in a process of its own without Ray, and the files that it opened.

`python -m tests.jobs.watched_jobs COMMANDS OPENED`: COMMANDS is a JSON file with a list of words each; their exit
statuses are written to standard output, the paths that Python opened to the file OPENED, a line each.
"""

import json
import sys
from pathlib import Path

import pytest

from rayembed import cli
from tests.jobs.without_ray import do_units_here


def main() -> None:
    """Runs them."""
    commands, opened = json.loads(Path(sys.argv[1]).read_text()), list[str]()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            opened.append(repr(arguments[0]))

    with pytest.MonkeyPatch.context() as patch:
        do_units_here(patch)
        sys.addaudithook(note)
        statuses = [cli.main(words) for words in commands]
    Path(sys.argv[2]).write_text("\n".join(opened))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
