"""Filters of candidates: each keeps a candidate or says in one word why it is dropped, and drops are counted by it."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """A retrieved passage of one query."""

    id: str
    text: str
    rank: int
    score: float


@dataclass(frozen=True)
class Query:
    """What filters may know of the query; positives are those of all rows with its text."""

    text: str
    positive_ids: frozenset[str]

    positive_texts: frozenset[str]
    """As `same_text` gives them."""


@dataclass
class Seen:
    """What was kept so far for this query."""

    texts: set[str] = field(default_factory=set)


def same_text(text: str) -> str:
    """The text with runs of white space made one blank: what counts as identical."""
    return " ".join(text.split())


def positive_id(query: Query, candidate: Candidate, seen: Seen) -> bool:
    """Is one of the query's positives."""
    return candidate.id in query.positive_ids


def positive_text(query: Query, candidate: Candidate, seen: Seen) -> bool:
    """Reads like one of the query's positives."""
    return same_text(candidate.text) in query.positive_texts


def positive_after_title(query: Query, candidate: Candidate, seen: Seen) -> bool:
    """Ends with one of the query's positives: corpora hold "title text" where rows may hold the bare text."""
    text = same_text(candidate.text)
    return any(text.endswith(f" {positive}") for positive in query.positive_texts)


def query_text(query: Query, candidate: Candidate, seen: Seen) -> bool:
    """Is the query itself."""
    return same_text(candidate.text) == same_text(query.text)


def repeated_text(query: Query, candidate: Candidate, seen: Seen) -> bool:
    """Reads like a candidate that was kept."""
    return same_text(candidate.text) in seen.texts


FILTERS: dict[str, Callable[[Query, Candidate, Seen], bool]] = {
    "positive_id": positive_id,
    "positive_text": positive_text,
    "positive_after_title": positive_after_title,
    "query_text": query_text,
    "repeated_text": repeated_text,
}


def drop_reason(query: Query, candidate: Candidate, seen: Seen) -> str | None:
    """The first filter that drops the candidate, by name; None keeps it and remembers it."""
    for name, drops in FILTERS.items():
        if drops(query, candidate, seen):
            return name
    seen.texts.add(same_text(candidate.text))
    return None
