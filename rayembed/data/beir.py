"""BEIR folders: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, joined by id."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rayembed.config.uris import public_name
from rayembed.data.problems import Problem, Report
from rayembed.data.readers import Record
from rayembed.data.storage import exists, join, open_input
from rayembed.data.store import Row, Store, chunks

QUERIES_AT_A_TIME = 1024  # queries whose passages are in memory together while rows are joined
BELOW_MIN_GRADE = "judgements below data.min_grade"  # above 0; under which they are counted
HEADER_WORDS = {"score", "relevance", "rel", "label"}


@dataclass(frozen=True, slots=True)
class Judgement:
    """One line of qrels; a score of at least data.min_grade makes the passage a positive of training."""

    query_id: str
    passage_id: str
    score: int
    line: int


def corpus_path(folder: str) -> str:
    """File of the passages."""
    return join(folder, "corpus.jsonl")


def queries_path(folder: str) -> str:
    """File of the queries."""
    return join(folder, "queries.jsonl")


def qrels_path(folder: str, split: str) -> str:
    """File of the judgements."""
    return join(folder, f"qrels/{split}.tsv")


def is_beir(path: str) -> bool:
    """Whether a path is a folder with passages and queries."""
    return exists(corpus_path(path)) and exists(queries_path(path))


def read_qrels(path: str, report: Report) -> list[Judgement]:
    """Judgements in file order; each pair of query and passage once.

    Lines are query, passage, score (with or without a header), or TREC's query, iteration, passage, score.
    """
    name, before = public_name(path), report.errors.total
    found: dict[tuple[str, str], Judgement] = {}
    if not exists(path):
        report.error(
            "no qrels",
            Problem(
                name, None, "", "there is no such file; training reads train.tsv, data.evaluation_split names the other"
            ),
        )
        return []
    with open_input(path) as file:
        for line, raw in enumerate(file, 1):
            judgement = _judgement(raw, Problem(name, line, "", ""), report)
            if judgement is None:
                continue
            report.count(f"judgements in {name}")
            pair = (judgement.query_id, judgement.passage_id)
            earlier = found.setdefault(pair, judgement)
            if earlier is not judgement:
                place = Problem(name, line, "score", f"query and passage were judged in line {earlier.line} already")
                if earlier.score != judgement.score:
                    report.error("two scores of one pair", place)
                else:
                    report.warn("repeated judgements, dropped", place)
    if not found and report.errors.total == before:
        report.error("no judgements", Problem(name, None, "", "holds no judgement (query-id, corpus-id, score)"))
    return list(found.values())


def check_ids(
    judgements: Sequence[Judgement], path: str, *, corpus: Store, queries: Store, corpus_file: str, report: Report
) -> None:
    """Every id of the judgements has its text; each that has none is an error, with its first line."""
    sides = (
        ("corpus-id", corpus, corpus_file, {j.passage_id: j.line for j in reversed(judgements)}),
        ("query-id", queries, "queries.jsonl", {j.query_id: j.line for j in reversed(judgements)}),
    )
    for field, store, where, lines in sides:
        names = list(lines)
        for i in np.flatnonzero(store.find_ids(names) < 0)[::-1]:
            message = f"{names[i]!r} is not in {where}"
            report.error(f"{field} without text", Problem(public_name(path), lines[names[i]], field, message))


def training_rows(
    judgements: Sequence[Judgement],
    path: str,
    *,
    dataset: str,
    corpus: Store,
    queries: Store,
    min_grade: int,
    report: Report,
) -> Iterator[tuple[Record, Row]]:
    """A row for each query with at least one positive, in the order in which the qrels name them.

    Ids without a text are left out of the positives; check_ids reports them.

    Args:
        judgements: of the queries.
        path: file of the judgements, for places.
        dataset: what the rows belong to.
        corpus: passages by id.
        queries: queries by id.
        min_grade: least score of a positive. Passages with a lower one above 0 are the row's related_ids.
        report: takes what is counted.
    """
    positives: dict[str, list[Judgement]] = {}
    related: dict[str, list[str]] = {}
    for judgement in judgements:
        positives.setdefault(judgement.query_id, [])
        if judgement.score >= min_grade:
            positives[judgement.query_id].append(judgement)
        elif judgement.score > 0:
            related.setdefault(judgement.query_id, []).append(judgement.passage_id)
    if related:
        report.count(BELOW_MIN_GRADE, sum(map(len, related.values())))
    report.count("queries without a positive", sum(not group for group in positives.values()))
    groups = [(name, group) for name, group in positives.items() if group]
    file = public_name(path)
    for chunk in chunks(groups, QUERIES_AT_A_TIME):
        asked = _texts(queries, [name for name, _ in chunk], ["text", "prompt"])
        texts = _texts(corpus, [judgement.passage_id for _, group in chunk for judgement in group], ["text"])
        for name, group in chunk:
            known = [judgement.passage_id for judgement in group if judgement.passage_id in texts]
            if name in asked and known:
                yield (
                    Record(file, group[0].line, {}),
                    {
                        "query_id": name,
                        "query": asked[name]["text"],
                        "prompt": asked[name]["prompt"],
                        "pos": [texts[passage]["text"] for passage in known],
                        "pos_ids": known,
                        "neg": [],
                        "neg_ids": [],
                        "dataset": dataset,
                        "related_ids": related.get(name),
                    },
                )


def _texts(store: Store, ids: Sequence[str], columns: list[str]) -> dict[str, Row]:
    """Columns by id, of the ids that the store has."""
    names = list(dict.fromkeys(ids))
    rows = store.find_ids(names)
    known = [name for name, row in zip(names, rows, strict=True) if row >= 0]
    return dict(zip(known, store.take(rows[rows >= 0], columns).to_pylist(), strict=True))


def _judgement(raw: bytes, place: Problem, report: Report) -> Judgement | None:
    """One line of qrels. None: blank, the header, or wrong (an error)."""
    assert place.line is not None
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        report.error("qrels line is wrong", Problem(place.file, place.line, "", f"not UTF-8 ({error})"))
        return None
    columns = [column.strip() for column in text.split("\t")] if "\t" in text else text.split()
    if not columns or (place.line == 1 and columns[-1].lower() in HEADER_WORDS):
        return None
    if len(columns) not in (3, 4) or not all(columns):
        message = (
            f"found {len(columns)} columns, allowed: query-id, corpus-id, score with tabs between (or TREC's four)"
        )
        report.error("qrels line is wrong", Problem(place.file, place.line, "", message))
        return None
    score = _whole_number(columns[-1])
    if score is None:
        message = f"found {columns[-1]!r}, allowed: a whole number"
        report.error("qrels score is not a number", Problem(place.file, place.line, "score", message))
        return None
    return Judgement(columns[0], columns[-2], score, place.line)


def _whole_number(text: str) -> int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if math.isfinite(value) and value == int(value) else None
