"""What training rows are of: retrieval, scored pairs or labelled texts. One format a file, told by its fields.

Scored pairs and labelled texts become rows of the same table as all others, under the types `sts` and `class`, and
what a job writes of them is read back in FlagEmbedding's form with that type.
"""

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Literal, NamedTuple

from rayembed.data import fields
from rayembed.data.problems import Report
from rayembed.data.readers import Record
from rayembed.data.store import Row

STS, CLASS, CLUSTERING = "sts", "class", "symmetric_clustering"
TYPES = ("normal", "only_1neg", "symmetric_class", CLUSTERING, "symmetric_sts", STS, CLASS)
OF_OWN_KIND = (STS, CLASS)  # types whose rows need neither negatives nor a search for them
Form = Literal["retrieval", "sts", "class"]
COMMON = ("query_id", "prompt", "dataset", "type")
RETRIEVAL = {"query", "pos", "neg", "positive", "negative"}


class Format(NamedTuple):
    """Fields of a format: the one whose text is the query, and the others that are its own."""

    query: str
    own: tuple[str, ...]


FORMATS: dict[Form, Format] = {
    "retrieval": Format(
        "query",
        (
            "pos",
            "pos_ids",
            "neg",
            "neg_ids",
            "pos_scores",
            "neg_scores",
            "related_ids",
            "label",
            "category",
            "positive",
            "negative",
        ),
    ),
    "sts": Format("sentence1", ("sentence2", "score")),
    "class": Format("text", ("label",)),
}


def form_of(record: Record) -> Form:
    """Which format a record is in, by the fields that it has; retrieval where they tell nothing."""
    has = {name for name, value in record.value.items() if value is not None}
    if has & RETRIEVAL:
        return "retrieval"
    return next((form for form in READ if has & {FORMATS[form].query, *FORMATS[form].own}), "retrieval")


def type_field(record: Record, form: Form, report: Report) -> str | None:
    """The row's type. None: it has none, or a wrong one (an error)."""
    value = fields.verbatim_field(record, "type", report)
    allowed = TYPES if form == "retrieval" else (form,)
    if value is None or value in allowed:
        return value if form == "retrieval" else form
    near = get_close_matches(value, allowed, n=1)
    message = f"found {value!r}, allowed: {', '.join(allowed)}" + (f"; did you mean {near[0]!r}?" if near else "")
    report.error("type is unknown", record.problem("type", message))
    return None


def scored_pair(record: Record, report: Report) -> Row:
    """Positive and score of a record with sentence1, sentence2 and score."""
    second = fields.text_field(record, "sentence2", report, required=True)
    score = fields.number_field(record, "score", report)
    pos = [] if second is None else [second]
    ids = [fields.passage_id(text) for text in pos]
    return {"pos": pos, "pos_ids": ids, "pos_scores": [score], "neg": [], "neg_ids": [], "neg_scores": []}


def labelled_text(record: Record, report: Report) -> Row:
    """Label of a record with text and label; its positives and negatives are other rows."""
    return {"label": label_field(record, report), "pos": [], "pos_ids": [], "neg": [], "neg_ids": []}


def label_field(record: Record, report: Report) -> str | None:
    """A label: a text or a whole number. None: it is absent or wrong (an error)."""
    if record.value.get("label") is None:
        report.error("no label", record.problem("label", fields.missing(record, "label")))
        return None
    return fields.id_field(record, "label", report)


def category_field(record: Record, report: Report) -> str | None:
    """The cluster that a row of type symmetric_clustering is of: FlagEmbedding's `category`, or our `label`."""
    given = next((name for name in ("category", "label") if record.value.get(name) is not None), "category")
    return fields.id_field(record, given, report)


def check_type(record: Record, row: Row, report: Report) -> None:
    """Refuses rows in FlagEmbedding's form that do not hold what their type needs."""
    if row["type"] == STS and (len(row["pos"]) != 1 or row["neg"] or row.get("pos_scores") is None):
        message = "is sts; allowed: one positive with its score in pos_scores, and no negatives"
        report.error("row does not fit its type", record.problem("type", message))
    if row["type"] == CLASS and (row["pos"] or row["neg"]):
        message = "is class; allowed: a label, and neither positives nor negatives: they are other rows of the dataset"
        report.error("row does not fit its type", record.problem("type", message))


def rows_of_type(rows: Iterable[tuple[Record, Row]], row_type: str, report: Report) -> Iterator[tuple[Record, Row]]:
    """The rows that are of a type; all others are errors."""
    for record, row in rows:
        found = row.get("type")  # rows of a BEIR folder say none
        if found == row_type:
            yield record, row
        else:
            form: Form = "sts" if row_type == STS else "class"
            wanted = ", ".join([FORMATS[form].query, *FORMATS[form].own])
            message = f"is of type {found or 'normal'}; allowed: rows of type {row_type}, with {wanted}"
            report.error("row of another type", record.problem(FORMATS[form_of(record)].query, message))


READ: dict[Form, Callable[[Record, Report], Row]] = {"sts": scored_pair, "class": labelled_text}
