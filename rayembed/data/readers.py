"""Files -> records (a JSON object or a table row, with its place), one at a time; what cannot be read is reported."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayembed.config.uris import public_name
from rayembed.data.problems import Problem, Report
from rayembed.data.storage import open_input

LOG_SECONDS = 5.0
PARQUET_ROWS = 1024  # rows turned into Python objects at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file. `file` is written without keys of a URI; `line` counts from 1 (in parquet, the row)."""

    file: str
    line: int | None
    value: dict[str, Any]

    def problem(self, field: str, message: str) -> Problem:
        """Something about a field of this record."""
        return Problem(self.file, self.line, field, message)


class Progress:
    """Logs a line at most every 5 seconds while something long is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.began = self.logged = time.monotonic()

    def tick(self) -> None:
        """Count one row."""
        self.number += 1
        now = time.monotonic()
        if now - self.logged >= LOG_SECONDS:
            self.logged = now
            logger.info("%s: %d rows, %.0f rows/s", self.name, self.number, self.number / (now - self.began))


def read_records(path: str, report: Report) -> Iterator[Record]:
    """All records of a file; lines that are not an object are errors in the report."""
    name = public_name(path)
    reader = READERS.get(_suffix(name))
    if reader is None:
        report.error("unknown format", Problem(name, None, "", f"allowed are files ending in {', '.join(READERS)}"))
        return
    progress = Progress(name)
    for line, value in reader(path, name, report):
        progress.tick()
        if isinstance(value, dict):
            yield Record(name, line, value)
        else:
            message = f"found {kind_of(value)}, allowed: an object with named fields, as {{...}}"
            report.error("not an object", Problem(name, line, "", message))


def kind_of(value: object) -> str:
    """What a JSON value is, in words for people."""
    return _KINDS.get(type(value), type(value).__name__)


def _read_lines(path: str, name: str, report: Report) -> Iterator[tuple[int, Any]]:
    """One JSON value a line; blank lines are counted."""
    with open_input(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                report.count(f"{name}: blank lines")
                continue
            try:
                yield line, json.loads(text)
            except (JSONDecodeError, UnicodeDecodeError) as error:
                report.error("not JSON", Problem(name, line, "", f"not JSON ({error}); allowed: one object a line"))


def _read_json(path: str, name: str, report: Report) -> Iterator[tuple[int, Any]]:
    """A file that is one array (held in memory as a whole), or lines as in jsonl."""
    with open_input(path) as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        if head.startswith(b"["):
            file.seek(0)
            try:
                text = file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                report.error("not JSON", Problem(name, None, "", f"not UTF-8 ({error})"))
                return
            yield from _array_items(text, name, report)
            return
    yield from _read_lines(path, name, report)


def _array_items(text: str, name: str, report: Report) -> Iterator[tuple[int, Any]]:
    """Elements of a JSON array, each with the line that it begins on; stops where the text is not JSON."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted, first = 1, 0, True
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == "]":
            break
        if not first and text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
            first = True
        line += text.count("\n", counted, at)
        counted = at
        try:
            if not first:
                raise JSONDecodeError("Expecting ',' delimiter", text, at)
            value, at = decoder.raw_decode(text, at)
        except JSONDecodeError as error:
            message = f"not JSON ({error}); what follows in this array was not read"
            report.error("not JSON", Problem(name, line, "", message))
            return
        first = False
        yield line, value
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        report.error("not JSON", Problem(name, line, "", "text after the end of the array"))


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_parquet(path: str, name: str, report: Report) -> Iterator[tuple[int, Any]]:
    """Rows of a parquet file, a batch at a time.

    Raises:
        OSError: it cannot be read now; a dropped connection and a damaged page look alike here, so the run ends.
    """
    row = 0
    with open_input(path) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
                for value in batch.to_pylist():
                    row += 1
                    yield row, value
        except pa.ArrowInvalid as error:
            message = f"not readable as parquet after row {row} ({error})"
            report.error("not parquet", Problem(name, row or None, "", message))
        except OSError as error:
            raise OSError(
                f"{name}: reading failed after row {row} ({error}); run the job again, and if it fails at the same row "
                "the file is damaged"
            ) from error


def _suffix(name: str) -> str:
    """The ending with its dot, in small letters."""
    return "." + name.rsplit(".", 1)[-1].lower() if "." in name else ""


_KINDS = {
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

Reader = Callable[[str, str, Report], Iterator[tuple[int, Any]]]
READERS: dict[str, Reader] = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet}
