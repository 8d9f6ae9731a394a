"""TREC run files: a line a ranked passage, `query_id Q0 passage_id rank score tag`, as trec_eval reads them.

White space separates the columns, so in an id it is written as in URLs: `a b` becomes `a%20b`. A `%` is written as
`%25` where it would be read as the beginning of such a code, and stays elsewhere.
"""

import math
import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

_CODED = re.compile(r"\s|%(?=[0-9A-Fa-f]{2})")


def write_run(path: Path, rankings: dict[str, list[tuple[str, float]]], *, tag: str) -> None:
    """Write rankings as a TREC run, atomically: the file is whole or not there.

    Args:
        path: file to write; its folder must exist.
        rankings: (passage id, score) pairs a query, best first; ranks are counted from 1.
        tag: name of the run, the last column.

    Raises:
        ValueError: an id is empty, the tag is empty or holds whitespace, or a score is not finite.
    """
    _check_word("tag", tag)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for query_id, ranking in rankings.items():
                query_word = _word("query id", query_id)
                for rank, (passage_id, score) in enumerate(ranking, start=1):
                    word = _word("passage id", passage_id)
                    if not math.isfinite(score):
                        raise ValueError(f"score of query {query_id!r} and passage {passage_id!r} is {score}")
                    file.write(f"{query_word} Q0 {word} {rank} {float(score)} {tag}\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """Read a TREC run: (passage id, score) pairs a query, in the order of their ranks.

    Raises:
        ValueError: a line is not a run line, or a query has a rank or a passage twice; names file and line.
    """
    ranked: dict[str, list[tuple[int, str, float]]] = {}
    seen: set[tuple[str, str | int]] = set()
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            query_id, passage_id, rank, score = _parse(line, f"{path}:{number}")
            for key in ((query_id, passage_id), (query_id, rank)):
                if key in seen:
                    raise ValueError(f"{path}:{number}: query {query_id!r} has {key[1]!r} twice")
                seen.add(key)
            ranked.setdefault(query_id, []).append((rank, passage_id, score))
    return {
        query_id: [(passage_id, score) for _, passage_id, score in sorted(entries)]
        for query_id, entries in ranked.items()
    }


def _parse(line: str, place: str) -> tuple[str, str, int, float]:
    try:
        query_id, _, passage_id, rank, score, _ = line.split()
        return unquote(query_id), unquote(passage_id), int(rank), float(score)
    except ValueError as error:
        raise ValueError(
            f"{place}: found {line.strip()!r}; a run line is `query_id Q0 passage_id rank score tag`"
        ) from error


def _word(what: str, text: str) -> str:
    """An id without white space, which unquote turns back."""
    word = _CODED.sub(lambda found: quote(found[0]), text)
    _check_word(what, word)
    return word


def _check_word(what: str, text: str) -> None:
    if text.split() != [text]:
        raise ValueError(f"{what} {text!r} is empty or holds whitespace, which separates the columns of a TREC run")
