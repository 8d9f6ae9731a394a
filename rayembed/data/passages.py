"""Records of a corpus or of queries -> rows of the PASSAGES and QUERIES schemas, with unique ids."""

from collections.abc import Callable, Iterable, Iterator

from rayembed.data import fields
from rayembed.data.problems import Problem, Report
from rayembed.data.readers import Record, read_records
from rayembed.data.store import Row, SeenHashes, chunks, hash_texts

BATCH = 1024  # rows held at a time while duplicates are looked for

Parse = Callable[[Record, Report], Row | None]


def parse_passage(record: Record, report: Report) -> Row | None:
    """Id and text (title and text, joined) of a passage; without an id, one made from the text. None: wrong."""
    before = report.errors.total
    parts = []
    for field in ("title", "text"):
        value = record.value.get(field)
        if value is None and field == "text":
            report.error("no text", record.problem(field, fields.missing(record, field)))
        elif isinstance(value, str):
            parts.append(value)
        elif value is not None:
            fields.text_field(record, field, report)
    joined = Record(record.file, record.line, {"text": " ".join(parts)})
    text = fields.text_field(joined, "text", report) if report.errors.total == before else None
    name = _named(record, report)
    if text is None or report.errors.total > before:
        return None
    return {"id": name or fields.passage_id(text), "text": text}


def parse_query(record: Record, report: Report) -> Row | None:
    """Id, text and prompt of a query; without an id, one made from the text. None: wrong."""
    before = report.errors.total
    text = fields.text_field(record, "text", report, required=True)
    prompt = record.value.get("prompt")
    if not isinstance(prompt, str):
        prompt = fields.text_field(record, "prompt", report)
    name = _named(record, report)
    if text is None or report.errors.total > before:
        return None
    return {"id": name or fields.query_id(text), "text": text, "prompt": prompt}


def read_texts(files: Iterable[str], parse: Parse, noun: str, report: Report) -> Iterator[Row]:
    """Unique rows of all files in order; `noun` (passages, queries) names them in the report."""

    def parsed() -> Iterator[tuple[Problem, Row]]:
        for path in files:
            for record in read_records(path, report):
                row = parse(record, report)
                if row is not None:
                    yield record.problem("text", ""), row

    return unique(parsed(), noun, report)


def unique(rows: Iterable[tuple[Problem, Row]], noun: str, report: Report) -> Iterator[Row]:
    """Rows whose id was not met before; the Problem of a row holds its place.

    The same id with the same text is dropped and counted, with another text it is an error. The same text under
    another id is kept and counted.
    """
    ids, texts, pairs = SeenHashes(), SeenHashes(), SeenHashes()
    for batch in chunks(rows, BATCH):
        id_met = ids.add(hash_texts(row["id"] for _, row in batch))
        text_met = texts.add(hash_texts(row["text"] for _, row in batch))
        pair_met = pairs.add(hash_texts(f"{row['id']}\0{row['text']}" for _, row in batch))
        for i, (place, row) in enumerate(batch):
            if id_met[i] and not pair_met[i]:
                message = f"{row['id']!r} stood for another text before; one id may stand for one text only"
                report.error(f"id of two {noun}", Problem(place.file, place.line, "id", message))
            elif id_met[i]:
                message = f"{row['id']!r} was there before with the same text; dropped"
                report.warn(f"repeated {noun}, dropped", Problem(place.file, place.line, "id", message))
            else:
                if text_met[i]:
                    message = f"the text of {row['id']!r} was there before under another id"
                    report.warn(f"duplicate texts of {noun}", Problem(place.file, place.line, "text", message))
                report.count(f"{noun} in {place.file}")
                yield row


def _named(record: Record, report: Report) -> str | None:
    """The id, under either name that is in use."""
    field = "_id" if record.value.get("_id") is not None else "id"
    return fields.id_field(record, field, report)
