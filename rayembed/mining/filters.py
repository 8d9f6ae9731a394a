"""Filters of candidates: each says which of one query's candidates it drops; drops are counted by its name.

Bounds are compared in float32, the precision of the scores: a candidate exactly at a bound stays, and so does one whose
score is not known (NaN).
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from rayembed.config.mine import MineConfig
from rayembed.mining.near_duplicates import near_duplicates

Mask = NDArray[np.bool_]
TELLING_WORDS = 5  # a text of so many does not end another one by chance


@dataclass(frozen=True)
class Candidates:
    """Retrieved passages of one query, best first.

    rows [n] are those of the corpus, ranks [n] count from 0; -1, with a score of NaN: drawn, not retrieved.
    """

    rows: NDArray[np.int64]
    ids: list[str]
    texts: list[str]
    ranks: NDArray[np.int64]
    scores: NDArray[np.float32]

    def keep(self, mask: Mask) -> "Candidates":
        """Those whose mask [n] is set, in their order."""
        places = np.flatnonzero(mask).tolist()
        ids, texts = ([column[i] for i in places] for column in (self.ids, self.texts))
        return Candidates(self.rows[mask], ids, texts, self.ranks[mask], self.scores[mask])


@dataclass(frozen=True)
class Query:
    """What filters may know of the query; positives are those of all rows with its text."""

    text: str
    positive_ids: frozenset[str]
    positive_texts: tuple[str, ...]

    positive_score: float | None
    """What margins are measured from. None: not known."""

    related_ids: frozenset[str] = frozenset()
    """Judged, but below data.min_grade: neither positive nor negative."""


Filter = Callable[[Query, Candidates], Mask]


def filters_of(config: MineConfig) -> dict[str, Filter]:
    """The filters that the settings ask for by name, in the order in which they are applied."""
    first, last = map(int, config.range_for_sampling.split("-"))
    bounded: dict[str, tuple[Callable[[float, Query, Candidates], Mask], float | None]] = {
        "near_duplicate": (near_duplicate, config.near_duplicate),
        "min_score": (min_score, config.min_score),
        "max_score": (max_score, config.max_score),
        "absolute_margin": (absolute_margin, config.absolute_margin),
        "relative_margin": (relative_margin, config.relative_margin),
    }
    return {
        "rank_window": partial(rank_window, first, last),
        "positive_id": positive_id,
        "related_id": related_id,
        "positive_text": positive_text,
        "positive_after_title": positive_after_title,
        "query_text": query_text,
        **{name: partial(drops, bound) for name, (drops, bound) in bounded.items() if bound is not None},
        "repeated_text": repeated_text,  # the last: what another filter drops must not stand for its equals
    }


def apply_filters(
    filters: Mapping[str, Filter], query: Query, candidates: Candidates
) -> tuple[Candidates, Counter[str]]:
    """What all filters leave, and how many each dropped of those that the ones before it left; none is no entry."""
    dropped = Counter[str]()
    for name, drops in filters.items():
        mask = drops(query, candidates)
        if mask.any():
            dropped[name] = int(mask.sum())
            candidates = candidates.keep(~mask)
    return candidates, dropped


@lru_cache(maxsize=512)  # several filters ask for the same candidates, one filter after the other
def same_text(text: str) -> str:
    """The text as it is compared: compatible characters (NFKC) and upper and lower case alike, white space one blank.

    Texts are the same if this is; it may have other letters than the text.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def rank_window(first: int, last: int, query: Query, candidates: Candidates) -> Mask:
    """Lies outside the ranks first to last - 1; what has no rank is not asked for it."""
    ranks = candidates.ranks
    return (ranks >= 0) & ((ranks < first) | (ranks >= last))


def positive_id(query: Query, candidates: Candidates) -> Mask:
    """Is one of the query's positives."""
    return _mask(name in query.positive_ids for name in candidates.ids)


def related_id(query: Query, candidates: Candidates) -> Mask:
    """Was judged to have something to do with the query."""
    return _mask(name in query.related_ids for name in candidates.ids)


def positive_text(query: Query, candidates: Candidates) -> Mask:
    """Reads like one of the query's positives."""
    positives = {same_text(text) for text in query.positive_texts}
    return _mask(same_text(text) in positives for text in candidates.texts)


def positive_after_title(query: Query, candidates: Candidates) -> Mask:
    """Ends with one of the query's positives: corpora hold "title text" where rows may hold the bare text.

    A positive of fewer than 5 words must be at least half of the candidate's characters: many texts end with "Yes".
    """
    positives = [same_text(text) for text in query.positive_texts]
    telling = [len(text.split()) >= TELLING_WORDS for text in positives]

    def drops(candidate: str) -> bool:
        return any(
            candidate.endswith(f" {text}") and (tells or 2 * len(text) >= len(candidate))
            for text, tells in zip(positives, telling, strict=True)
        )

    return _mask(drops(same_text(text)) for text in candidates.texts)


def near_duplicate(bound: float, query: Query, candidates: Candidates) -> Mask:
    """Shares with a positive at least `bound` of their 3-grams of words; exactly so much is dropped too."""
    return near_duplicates(query.positive_texts, candidates.texts, bound)


def query_text(query: Query, candidates: Candidates) -> Mask:
    """Is the query itself."""
    asked = same_text(query.text)
    return _mask(same_text(text) == asked for text in candidates.texts)


def min_score(bound: float, query: Query, candidates: Candidates) -> Mask:
    """Scores below the bound."""
    return candidates.scores < np.float32(bound)


def max_score(bound: float, query: Query, candidates: Candidates) -> Mask:
    """Scores above the bound."""
    return candidates.scores > np.float32(bound)


def absolute_margin(margin: float, query: Query, candidates: Candidates) -> Mask:
    """Scores above the positive minus the margin; nothing, where the positive's score is not known."""
    positive = query.positive_score
    return max_score(float("inf") if positive is None else positive - margin, query, candidates)


def relative_margin(margin: float, query: Query, candidates: Candidates) -> Mask:
    """Scores above p - |p| x margin, p the positive's score; nothing, where that is not known.

    For p > 0 this is (1 - margin) x p, TopK-PercPos of NV-Retriever (arXiv 2407.15831); for p < 0 that would lie above
    p, so that a larger margin would drop less.
    """
    positive = query.positive_score
    return max_score(float("inf") if positive is None else positive - abs(positive) * margin, query, candidates)


def repeated_text(query: Query, candidates: Candidates) -> Mask:
    """Reads like a better one."""
    texts = [same_text(text) for text in candidates.texts]
    first: dict[str, int] = {}
    return _mask(first.setdefault(text, i) != i for i, text in enumerate(texts))


def _mask(flags: Iterable[bool]) -> Mask:
    return np.fromiter(flags, np.bool_)
