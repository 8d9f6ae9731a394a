"""Fields of a record -> checked values. What is wrong goes to the report by file, line and field, and None comes back.

Texts lose the white space around them everywhere, so that a passage is the same passage in rows and corpus.
"""

import hashlib
import math
from difflib import get_close_matches

from rayembed.data.problems import Report
from rayembed.data.readers import Record, kind_of


def passage_id(text: str) -> str:
    """Id of a passage that came without one."""
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:16]


def query_id(text: str) -> str:
    """Id of a query that came without one."""
    return "q" + hashlib.sha256(text.encode()).hexdigest()[:16]


def text_field(record: Record, field: str, report: Report, *, required: bool = False) -> str | None:
    """A text. None: it is absent (an error if `required`) or wrong (an error)."""
    value = record.value.get(field)
    if value is None:
        if required:
            report.error(f"no {field}", record.problem(field, missing(record, field)))
        return None
    return _text(record, field, value, report)


def verbatim_field(record: Record, field: str, report: Report) -> str | None:
    """A text that may be empty and keeps its white space, as a prompt does. None: it is absent or wrong (an error)."""
    value = record.value.get(field)
    if not isinstance(value, str):
        return text_field(record, field, report)
    return value if _encodable(record, field, value, report, field) else None


def texts_field(record: Record, field: str, report: Report) -> list[str] | None:
    """A list of texts. None: it is absent, or something in it is wrong (an error)."""
    value = record.value.get(field)
    if value is None:
        return None
    if not isinstance(value, list):
        message = f"found {kind_of(value)}, allowed: a list of texts, as [...]"
        report.error(f"{field} is not a list", record.problem(field, message))
        return None
    texts = [_text(record, f"{field}[{i}]", item, report, kind=field) for i, item in enumerate(value)]
    known = [text for text in texts if text is not None]
    return known if len(known) == len(texts) else None


def id_field(record: Record, field: str, report: Report) -> str | None:
    """An id: a text or a whole number. None: it is absent or wrong (an error)."""
    value = record.value.get(field)
    return None if value is None else _id(record, field, value, report)


def ids_field(record: Record, field: str, texts: list[str], report: Report) -> list[str] | None:
    """Ids of texts, of the same number. Absent: from the texts. None: wrong (an error)."""
    value = record.value.get(field)
    if value is None:
        return [passage_id(text) for text in texts]
    if not isinstance(value, list) or len(value) != len(texts):
        found = f"{len(value)} ids" if isinstance(value, list) else kind_of(value)
        message = f"found {found}, allowed: a list of {len(texts)}, one for each passage"
        report.error(f"{field} does not fit", record.problem(field, message))
        return None
    return _ids(record, field, value, report)


def id_list_field(record: Record, field: str, report: Report) -> list[str] | None:
    """Ids of any number. None: they are absent, or wrong (an error)."""
    value = record.value.get(field)
    if value is None:
        return None
    if not isinstance(value, list):
        message = f"found {kind_of(value)}, allowed: a list of ids, as [...]"
        report.error(f"{field} is not a list", record.problem(field, message))
        return None
    return _ids(record, field, value, report)


def scores_field(record: Record, field: str, number: int, report: Report) -> list[float] | None:
    """`number` finite numbers. None: absent, or wrong (an error)."""
    value = record.value.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != number:
        found = f"{len(value)} scores" if isinstance(value, list) else kind_of(value)
        message = f"found {found}, allowed: a list of {number}, one for each passage, or no {field}"
        report.error(f"{field} has the wrong length", record.problem(field, message))
        return None
    for i, score in enumerate(value):
        if not _is_number(score):
            message = f"found {score!r}, allowed: finite numbers"
            report.error(f"{field} is not a number", record.problem(f"{field}[{i}]", message))
            return None
    return [float(score) for score in value]


def number_field(record: Record, field: str, report: Report) -> float | None:
    """A finite number that must be there. None: it is absent or wrong (an error)."""
    value = record.value.get(field)
    if value is None:
        report.error(f"no {field}", record.problem(field, missing(record, field)))
    elif not _is_number(value):
        report.error(f"{field} is not a number", record.problem(field, f"found {value!r}, allowed: a finite number"))
    else:
        return float(value)
    return None


def missing(record: Record, field: str) -> str:
    """Message for a field that is not there, with the nearest one that is."""
    near = get_close_matches(field, [name for name in record.value if name != field], n=1, cutoff=0.5)
    return "is missing or null" + (f"; the nearest field here is {near[0]!r}" if near else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(record: Record, field: str, value: object, report: Report, kind: str | None = None) -> str | None:
    kind = kind or field
    if not isinstance(value, str):
        report.error(f"{kind} is not text", record.problem(field, f"found {kind_of(value)}, allowed: a text"))
        return None
    text = value.strip()
    if not text:
        report.error(f"{kind} is empty", record.problem(field, "the text is empty or only white space"))
        return None
    return text if _encodable(record, field, text, report, kind) else None


def _ids(record: Record, field: str, values: list[object], report: Report) -> list[str] | None:
    ids = [_id(record, f"{field}[{i}]", item, report) for i, item in enumerate(values)]
    known = [name for name in ids if name is not None]
    return known if len(known) == len(ids) else None


def _id(record: Record, field: str, value: object, report: Report) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "an empty text" if value == "" else kind_of(value)
        message = f"found {found}, allowed: a text or a whole number"
        report.error("ids are wrong", record.problem(field, message))
        return None
    return str(value) if _encodable(record, field, str(value), report, "id") else None


def _encodable(record: Record, field: str, text: str, report: Report, kind: str) -> bool:
    """Whether a text can be written to a file: JSON may hold one half of a surrogate pair (an error)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text holds half a character that no encoding can write ({error.reason})"
        report.error(f"{kind} is not text", record.problem(field, message))
        return False
    return True
