"""What was mined, in words: the sentences at the top of audit.html."""

from dataclasses import dataclass
from typing import Any

from rayembed.report import wording

# Shares above which the page says so, and what can be done: where a reader should look, not laws of nature.
SUSPECTED_BY_TEACHER = 0.05  # of the pairs that it judged
SUSPECTED_BY_SCORE = 0.1  # of the pairs whose scores are known; a weak model puts true negatives there as well
WITHOUT_SCORE = 0.2  # of the positives
FILLED_UP = 0.05  # of the negatives
SHORT = 0.01  # of the queries
USES = 0.05  # of the queries, by one passage
USES_FEW = 20  # uses of a passage that are never worth a word


@dataclass(frozen=True)
class Verdict:
    """What was mined in words; `kind` is better or worse, as the page colours them."""

    kind: str
    badge: str
    sentences: list[str]
    concerns: list[str]


def verdict(stats: dict[str, Any], audit: dict[str, Any], *, window: tuple[int, int]) -> Verdict:
    """The four things to know, and those that a reader should look into first, with the settings that change them."""
    counts = audit["counts"]
    concerns = _concerns(counts, stats.get("uses"))
    corpus = f" of {stats['passages']:,} passages" if stats.get("passages") is not None else ""
    sentences = [
        f"{many(counts['negatives'], 'negative')} for {many(counts['queries'], 'query')}, "
        f"from ranks {window[0]:,} to {window[1] - 1:,}{corpus}.",
        _suspicion(counts),
        _shortage(counts),
        _most_dropped(stats.get("dropped", audit["dropped"])),
    ]
    if concerns:
        return Verdict("worse", "Look at this first", sentences, concerns)
    return Verdict("better", "Nothing stands out in the figures", sentences, [])


def _suspicion(counts: dict[str, int]) -> str:
    pairs = (
        f"{counts['suspected_false_negatives']:,} ({share(counts['suspected_false_negatives'], counts['negatives'])})"
    )
    by_score = "no pair has scores to compare"
    if counts["compared_pairs"]:
        by_score = (
            f"{counts['suspected_by_score']:,} of {counts['compared_pairs']:,} "
            f"({share(counts['suspected_by_score'], counts['compared_pairs'])}) score at or above the lowest positive"
        )
    by_teacher = "the teacher judged none"
    if counts["judged_pairs"]:
        by_teacher = (
            f"the teacher puts {counts['suspected_by_teacher']:,} of the {counts['judged_pairs']:,} that it judged "
            f"({share(counts['suspected_by_teacher'], counts['judged_pairs'])}) at or above a positive"
        )
    return f"Suspected false negatives: {pairs}. Of the pairs, {by_score}; {by_teacher}."


def _shortage(counts: dict[str, int]) -> str:
    if not counts["short_by"] and not counts["filled_up"]:
        return "Every query has as many as were asked for, all from the window."
    return (
        f"{many(counts['queries_short'], 'query')} short by {many(counts['short_by'], 'negative')} in all; "
        f"{many(counts['filled_up'], 'negative')} drawn at random to fill up "
        f"{many(counts['queries_filled_up'], 'query')}."
    )


def _most_dropped(dropped: dict[str, int]) -> str:
    total = sum(dropped.values())
    if not total:
        return "No candidate was dropped."
    name, count = min(dropped.items(), key=lambda item: (-item[1], item[0]))
    most = f"most by {wording.title_of(name)} ({count:,}, {share(count, total)})"
    return f"{many(total, 'candidate')} dropped, {most}."


def _concerns(counts: dict[str, int], uses: dict[str, Any] | None) -> list[str]:
    if not counts["negatives"]:
        return ["There is no negative at all: widen mine.range_for_sampling, or loosen the filters of section mine."]
    most = (uses or {}).get("most") or 0
    checks = [
        (
            _above(counts["suspected_by_teacher"], counts["judged_pairs"], SUSPECTED_BY_TEACHER),
            "Many negatives look relevant to the teacher: mine.denoise drops such, mine.relative_margin what scores "
            "close to the positive.",
        ),
        (
            _above(counts["suspected_by_score"], counts["compared_pairs"], SUSPECTED_BY_SCORE),
            "Many negatives score at or above a positive. Read the pairs below: if they are answers, set "
            "mine.relative_margin or mine.denoise; if they are not, the model is weak here and these are what it must "
            "learn.",
        ),
        (
            _above(counts["positives_without_score"], counts["positives"], WITHOUT_SCORE),
            f"{share(counts['positives_without_score'], counts['positives'])} of the positives have no score: margins "
            "drop nothing for a query where none has one.",
        ),
        (
            _above(counts["filled_up"], counts["negatives"], FILLED_UP),
            f"{share(counts['filled_up'], counts['negatives'])} of the negatives are random and easy: widen "
            "mine.range_for_sampling, loosen the filters, or lower mine.negative_number.",
        ),
        (
            _above(counts["queries_short"], counts["queries"], SHORT),
            f"{share(counts['queries_short'], counts['queries'])} of the queries have too few negatives: widen "
            "mine.range_for_sampling, loosen the filters, or set mine.fill_up.",
        ),
        (
            most > USES_FEW and _above(most, counts["queries"], USES),
            f"One passage is a negative of {many(most, 'query')}: mine.max_uses sets a limit.",
        ),
    ]
    return [sentence for is_so, sentence in checks if is_so]


def _above(part: int, whole: int, bound: float) -> bool:
    return bool(whole) and part / whole > bound


def share(part: int, whole: int) -> str:
    """Percent with the digits that a small share needs; 0 and all are said so."""
    if not whole:
        return wording.ABSENT
    percent = 100 * part / whole
    if 0 < percent < 0.01:
        return "less than 0.01 %"
    return f"{percent:.2f} %" if 0 < percent < 1 else f"{percent:.1f} %" if percent % 1 else f"{percent:.0f} %"


def many(count: int, noun: str) -> str:
    """A number with its noun, as it should read."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
