"""Records of a corpus or of queries -> rows of the PASSAGES and QUERIES schemas, with unique ids."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from rayembed.data import fields
from rayembed.data.names import Names
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
    prompt = fields.verbatim_field(record, "prompt", report)
    name = _named(record, report)
    if text is None or report.errors.total > before:
        return None
    return {"id": name or fields.query_id(text), "text": text, "prompt": prompt}


def read_texts(
    files: Iterable[str], parse: Parse, noun: str, report: Report, *, sources: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Unique rows of all files in order.

    Args:
        files: paths.
        parse: a record to a row.
        noun: what the rows are (passages, queries), for the report.
        report: takes what is found.
        sources: source of each file: ids must stand for one text within a source. None: all files are one.
    """

    def parsed() -> Iterator[tuple[Problem, str, Row]]:
        for path in files:
            source = sources[path] if sources else ""
            for record in read_records(path, report):
                row = parse(record, report)
                if row is not None:
                    yield record.problem("text", ""), source, row

    return unique(parsed(), noun, report)


def unique(rows: Iterable[tuple[Problem, str, Row]], noun: str, report: Report) -> Iterator[Row]:
    """Rows (place, source, row) whose id was not met before; no row at all is an error.

    The same id with the same text is dropped and counted. With another text it gets the source's name before it,
    counted, where the other text is of another source; of the same source it is an error. The same text under another
    id is kept and counted.
    """
    names, texts = Names(), SeenHashes()
    for batch in chunks(rows, BATCH):
        settled = names.settle([(source, row["id"], row["text"]) for _, source, row in batch])
        text_met = texts.add(hash_texts(row["text"] for _, _, row in batch))
        for i, (place, _, row) in enumerate(batch):
            name = settled[i].name
            if settled[i].conflict:
                message = (
                    f"{row['id']!r} stood for another text before; one id may stand for one text only "
                    "(files of different corpora: list each by itself in the experiment file)"
                )
                report.error(f"id of two {noun}", Problem(place.file, place.line, "id", message))
            elif settled[i].met:
                message = f"{row['id']!r} was there before with the same text; dropped"
                report.warn(f"repeated {noun}, dropped", Problem(place.file, place.line, "id", message))
            else:
                if text_met[i]:
                    message = f"the text of {row['id']!r} was there before under another id"
                    report.warn(f"duplicate texts of {noun}", Problem(place.file, place.line, "text", message))
                if name != row["id"]:
                    message = f"{row['id']!r} stood for another text in another source; {name!r} is used here"
                    report.warn(renamed(noun), Problem(place.file, place.line, "id", message))
                report.count(f"{noun} in {place.file}")
                yield {**row, "id": name}


def renamed(noun: str) -> str:
    """Under which warning the ids are counted that got their source's name before them."""
    return f"ids of {noun} of two sources, renamed"


def _named(record: Record, report: Report) -> str | None:
    """The id, under either name that is in use."""
    field = "_id" if record.value.get("_id") is not None else "id"
    return fields.id_field(record, field, report)
