"""Records -> training rows: FlagEmbedding's form (query, pos, neg, ...), triplets, scored pairs and labelled texts."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from rayembed.data import fields
from rayembed.data.names import Names
from rayembed.data.problems import Report
from rayembed.data.readers import Record
from rayembed.data.store import Row, SeenHashes, chunks, hash_texts
from rayembed.data.tasks import (
    CLASS,
    CLUSTERING,
    COMMON,
    FORMATS,
    OF_OWN_KIND,
    READ,
    Form,
    category_field,
    check_type,
    form_of,
    label_field,
    type_field,
)

TRIPLET = {"positive": "pos", "negative": "neg"}
ELSEWHERE = {  # columns of FlagEmbedding that are settings here
    name: f"; set {name} of this dataset in data.datasets" for name in ("batch_size", "train_group_size")
}
UNREAD = {CLASS: {"category"}, CLUSTERING: set[str]()}  # columns of labels, by type; of other types both
BATCH = 1024  # rows held at a time while duplicates are looked for


def parse_row(record: Record, report: Report, *, dataset: str | None = None) -> Row | None:
    """A row of the ROWS schema. None: something is wrong with it (errors in the report).

    Ids that the record lacks come from the texts.

    Args:
        record: one object of a file.
        report: takes what is wrong.
        dataset: what the row belongs to unless it says so itself. None: its file.
    """
    before = report.errors.total
    form = form_of(record)
    _unknown_columns(record, form, report)
    query = fields.text_field(record, FORMATS[form].query, report, required=True)
    row: Row = {
        "query_id": fields.id_field(record, "query_id", report) or (query and fields.query_id(query)),
        "query": query,
        "prompt": fields.verbatim_field(record, "prompt", report),
        "dataset": fields.text_field(record, "dataset", report) or dataset or record.file,
        "type": type_field(record, form, report),
        "related_ids": fields.id_list_field(record, "related_ids", report),
        **(READ[form](record, report) if form in READ else {}),
    }
    if form == "retrieval":
        _passage_fields(record, row, report)
    if report.errors.total == before:
        check_type(record, row, report)
        _both(record, row, report)
    return row if report.errors.total == before else None


def parse_rows(
    records: Iterable[Record], report: Report, *, dataset: str | None = None
) -> Iterator[tuple[Record, Row]]:
    """The rows of one file with their places; records in another format than its first are errors."""
    first: Form | None = None
    for record in records:
        form = form_of(record)
        first = first or form
        if form != first:
            message = (
                f"is of format {form}, and the first record of this file is of {first}; allowed: one format a file"
            )
            report.error("two formats in one file", record.problem(FORMATS[form].query, message))
            continue
        row = parse_row(record, report, dataset=dataset)
        if row is not None:
            yield record, row


def _passage_fields(record: Record, row: Row, report: Report) -> None:
    """Puts what FlagEmbedding's form and triplets say of passages into the row."""
    pos = _passages(record, "pos", report)
    neg = _passages(record, "neg", report)
    if row["type"] == CLASS:
        row["label"] = label_field(record, report)
    elif pos == [] or (record.value.get("pos") is None and record.value.get("positive") is None):
        message = "is empty; allowed: at least one passage" if pos == [] else fields.missing(record, "pos")
        report.error("no pos", record.problem("pos", message))
    if row["type"] == CLUSTERING:
        row["label"] = category_field(record, report)
    row["pos"], row["neg"] = pos if pos is not None or row["type"] != CLASS else [], neg or []
    for name, texts in (("pos", row["pos"]), ("neg", neg if neg is not None else [])):
        if texts is not None:
            row[f"{name}_ids"] = fields.ids_field(record, f"{name}_ids", texts, report)
            row[f"{name}_scores"] = fields.scores_field(record, f"{name}_scores", len(texts), report)
    if row.get("pos_scores") is not None and not row["neg"]:
        row["neg_scores"] = []


def survey(rows: Iterable[tuple[Record, Row]], report: Report) -> Iterator[Row]:
    """Pass rows on, and note what is unusual over all of them; the record of a row holds its place.

    A query_id that another dataset has for another query gets the dataset before it; within a dataset it is an error.
    """
    seen = {name: SeenHashes() for name in ("query", "row")}
    names = Names()
    for batch in chunks(rows, BATCH):
        keys = [_keys(row) for _, row in batch]
        met = {name: each.add(hash_texts(key[name] for key in keys)) for name, each in seen.items()}
        settled = names.settle([(row["dataset"], row["query_id"], row["query"]) for _, row in batch])
        for i, (place, row) in enumerate(batch):
            _note_absent(place, row, report)
            if met["row"][i]:
                _warn(report, "duplicate rows", place, "query", "an earlier row has the same query and positives")
            elif met["query"][i] and row.get("type") == CLASS:
                _warn(report, "texts of two labels", place, "label", "an earlier row has this text under another label")
            elif met["query"][i] and row.get("type") not in OF_OWN_KIND:
                _warn(report, "same query in several rows", place, "query", "an earlier row has this query")
            if settled[i].conflict:
                message = (
                    f"{row['query_id']!r} stood for another query of the dataset {row['dataset']!r} before; "
                    "one id may stand for one text only"
                )
                report.error("query_id of two queries", place.problem("query_id", message))
            elif settled[i].name != row["query_id"]:
                message = f"{row['query_id']!r} is a query of another dataset too; {settled[i].name!r} is used here"
                _warn(report, "query ids of two datasets, renamed", place, "query_id", message)
            yield {**row, "query_id": settled[i].name}
    _only_where_mixed(report)


def _keys(row: Row) -> dict[str, str]:
    query, label = row["query"], row.get("label")
    if row.get("type") == CLASS and label is not None:  # another dataset may have other labels for the same text
        return {"query": f"{row['dataset']}\0{query}", "row": "\0".join([row["dataset"], query, label])}
    return {"query": query, "row": "\0".join([query, *sorted(row["pos"])])}


def _note_absent(place: Record, row: Row, report: Report) -> None:
    """Count the row, and what it may have and has not."""
    report.count("rows")
    report.count(f"rows of {row['dataset']}")
    report.count("positives", len(row["pos"]))
    report.count("negatives", len(row["neg"]))
    if row.get("type") in OF_OWN_KIND:
        report.count(f"rows of type {row['type']}")
        return
    if not row["neg"]:
        _warn(report, "rows without negatives", place, "neg", "no negatives")
    if row.get("pos_scores") is None or (row["neg"] and row.get("neg_scores") is None):
        _warn(report, "rows without scores", place, "pos_scores", "no teacher scores for every passage")
    if row.get("prompt") is None:
        _warn(report, "rows without prompt", place, "prompt", "no prompt of its own, as other rows have")


def _only_where_mixed(report: Report) -> None:
    """Rows without scores or prompt are unusual only if others have them; how many is counted in any case."""
    others = sum(report.counts.get(f"rows of type {kind}", 0) for kind in OF_OWN_KIND)
    for kind in ("rows without scores", "rows without prompt"):
        number = report.warnings.counts.get(kind, 0)
        report.count(kind, number)
        if number == report.counts.get("rows", 0) - others:
            report.warnings.drop(kind)


def _warn(report: Report, kind: str, place: Record, field: str, message: str) -> None:
    report.warn(kind, place.problem(field, message))


def _passages(record: Record, field: str, report: Report) -> list[str] | None:
    """The texts of pos or neg in either form. None: absent or wrong."""
    single = next(name for name, list_name in TRIPLET.items() if list_name == field)
    if record.value.get(single) is None:
        return fields.texts_field(record, field, report)
    if record.value.get(field) is not None:
        message = f"found {single} and {field} in one row, allowed: one of them"
        report.error("two forms in one row", record.problem(field, message))
        return None
    text = fields.text_field(record, single, report)
    return None if text is None else [text]


def _both(record: Record, row: Row, report: Report) -> None:
    """Refuse a passage that is positive and negative of the same query."""
    texts, ids = set(row["pos"]), set(row["pos_ids"])
    for i, (text, name) in enumerate(zip(row["neg"], row["neg_ids"], strict=True)):
        if text in texts or name in ids:
            message = f"{text[:60]!r} is also a positive of this query; allowed: one of the two"
            report.error("passage is both pos and neg", record.problem(f"neg[{i}]", message))


def _unknown_columns(record: Record, form: Form, report: Report) -> None:
    unread = UNREAD.get(str(record.value.get("type")), {"label", "category"}) if form == "retrieval" else set()
    columns = [name for name in (*COMMON, FORMATS[form].query, *FORMATS[form].own) if name not in unread]
    for name in [name for name in record.value if name not in columns]:
        near = get_close_matches(name, columns, n=1)
        message = "this column is not read" + ELSEWHERE.get(name, f"; did you mean {near[0]!r}?" if near else "")
        shown = name.encode(errors="backslashreplace").decode()
        report.warn(f"column {name!r} is not read", record.problem(shown, message))
