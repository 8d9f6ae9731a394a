"""What mining chose, for people to look at before they train on it: counts, histograms, and the queries to look at.

A unit's part is JSON of bounded size, and parts add up: counts and histograms are sums, lists keep the first of an
order that knows nothing of units. So the whole is the same however the rows were cut into units.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EXAMPLES = 20  # rows drawn at random
LISTED = 20  # queries with too few negatives, and suspected false negatives of each kind
TEXT_LIMIT = 400  # characters kept of a text: enough to judge by, and 20 pairs stay below 30 kB
POSITIVES_LISTED, NEGATIVES_LISTED = 3, 20  # of an example
COUNTS = (
    *("queries", "negatives", "filled_up", "queries_filled_up", "short_by", "queries_short"),
    *("positives", "positives_without_score", "compared_pairs", "judged_queries", "judged_pairs"),
    *("suspected_false_negatives", "suspected_by_score", "suspected_by_teacher"),
)
HISTOGRAMS = ("negative_scores", "positive_scores", "margins", "teacher_margins")
SUSPECTS = ("suspected_by_score", "suspected_by_teacher")


@dataclass(frozen=True)
class Negative:
    """A passage that was chosen for a query; it has no rank where it was drawn at random to fill up."""

    row: int
    """Of the corpus."""

    id: str
    text: str
    rank: int | None
    score: float | None
    """By the model that mines. None: unknown."""

    teacher: float | None
    """Score by the teacher. None: not judged."""


@dataclass(frozen=True)
class Mined:
    """One query after selection."""

    query_id: str
    query: str
    positives: list[str]
    positive_ids: list[str]

    positive_scores: list[float | None]
    """By the model that mines, one a positive. None: unknown."""

    positive_teacher: list[float | None]
    """By the teacher, one a positive. None: not judged."""

    negatives: list[Negative]

    wanted: int
    """Negatives asked for."""

    dropped: dict[str, int]
    """Candidates by the filter that dropped them."""


def example_rows(num_rows: int, seed: int) -> frozenset[int]:
    """Numbers of EXAMPLES rows (all, if there are no more), however rows are cut into units."""
    rng = np.random.default_rng(seed)
    return frozenset(rng.choice(num_rows, min(EXAMPLES, num_rows), replace=False).tolist())


def rank_bins(first_rank: int, last_rank: int) -> int:
    """Bins of a window of ranks: one a rank where that can be drawn, so that bins hold equally many, else 20."""
    window = last_rank - first_rank
    return window if window <= 60 else 20


def part_audit(mined: Sequence[Mined], *, first_rank: int, last_rank: int, shown: Sequence[int]) -> dict[str, Any]:
    """The part of one unit, as JSON; `summed` says what is in it.

    Args:
        mined: queries of the unit, in the order of the rows.
        first_rank: of the window.
        last_rank: of the window, not in it.
        shown: places in `mined` of the queries that are shown as examples.
    """
    bins = rank_bins(first_rank, last_rank)
    ranks = [n.rank - first_rank for one in mined for n in one.negatives if n.rank is not None]
    places = np.array(ranks, np.int64) * bins // max(last_rank - first_rank, 1)
    return _merged([_of_query(one) for one in mined]) | {
        "ranks": np.bincount(places, minlength=bins).tolist(),
        "examples": [_example(mined[i]) for i in sorted(shown)],
    }


def summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of all units, in the order of the rows, as one; sums of sums are right too.

    Returns:
        counts: COUNTS by name. `filled_up` negatives were drawn at random; `short_by` are those that are missing even
            so. `compared_pairs` have a negative and a positive whose scores by the miner are known, `judged_pairs` by
            the teacher. A pair is suspected if its negative scores at or above the lowest known positive of the query,
            by the miner or by the teacher; `suspected_false_negatives` counts a pair once.
        dropped: candidates by filter.
        ranks: [rank_bins] negatives over the window.
        histograms: HISTOGRAMS by name, each {value: count}. Values are texts of a number, to 3 decimals below 1 and to
            3 digits from there on, with no clipping. A margin is the query's lowest known positive score minus the
            negative's: 0 and below is suspect. teacher_margins are in the teacher's units.
        suspected_by_score, suspected_by_teacher: the LISTED pairs with the lowest margins, ties by query id and id,
            with the texts of query, positive (the one that scores lowest) and negative.
        short: the first LISTED queries by row with fewer negatives than wanted, then those that were filled up.
        examples: the queries that were `shown`.
    """
    return _merged(parts) | {
        "ranks": np.sum([part["ranks"] for part in parts], axis=0).tolist(),
        "examples": [example for part in parts for example in part["examples"]],
    }


def figures(audit: dict[str, Any]) -> dict[str, Any]:
    """COUNTS, dropped, and two measures, for stats.json.

    Args:
        audit: as `summed` gives it.

    Returns:
        mean_negative_score and median_margin are None where no score is known; they are those of the histograms, so
        within 0.0005 below 1.
    """
    return {
        **audit["counts"],
        "mean_negative_score": _mean(audit["histograms"]["negative_scores"]),
        "median_margin": _median(audit["histograms"]["margins"]),
        "dropped": dict(sorted(audit["dropped"].items())),
    }


def table(stats: dict[str, Any], audit: dict[str, Any]) -> str:
    """A summary for the log, in aligned columns.

    Args:
        stats: `figures`, and `passages`, the size of the corpus, where it is known.
        audit: as `summed` gives it.
    """
    counts, histograms, drops = audit["counts"], audit["histograms"], audit["dropped"]
    drops_most = sorted(drops.items(), key=lambda item: (-item[1], item[0]))[:3]

    def share(name: str, whole: str) -> str:
        return f"{counts[name] / counts[whole]:.2%} of them" if counts[whole] else ""

    rows = [
        ("queries", counts["queries"], ""),
        ("passages", stats.get("passages"), ""),
        ("negatives", counts["negatives"], _middle("score", histograms["negative_scores"])),
        ("  drawn at random to fill up", counts["filled_up"], f"for {counts['queries_filled_up']:,} queries"),
        ("  missing", counts["short_by"], f"for {counts['queries_short']:,} queries"),
        ("positives", counts["positives"], _middle("score", histograms["positive_scores"])),
        ("  without a score", counts["positives_without_score"], share("positives_without_score", "positives")),
        ("pairs compared by score", counts["compared_pairs"], _middle("margin", histograms["margins"])),
        ("  suspected false negatives", counts["suspected_by_score"], share("suspected_by_score", "compared_pairs")),
        ("pairs judged by the teacher", counts["judged_pairs"], _middle("margin", histograms["teacher_margins"])),
        ("  suspected false negatives", counts["suspected_by_teacher"], share("suspected_by_teacher", "judged_pairs")),
        ("candidates dropped", sum(drops.values()), ", ".join(f"{name} {count:,}" for name, count in drops_most)),
    ]
    texts = [(name, "-" if count is None else f"{count:,}", note) for name, count, note in rows]
    names, numbers = (max(len(row[column]) for row in texts) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {number:>{numbers}}  {note}".rstrip() for name, number, note in texts)


def _middle(of: str, histogram: dict[str, int]) -> str:
    middle = _median(histogram)
    return "" if middle is None else f"median {of} {middle:.3f}"


def _of_query(mined: Mined) -> dict[str, Any]:
    """The part of one query, without ranks and examples."""
    by_score = _margins(mined.positive_scores, [n.score for n in mined.negatives])
    by_teacher = _margins(mined.positive_teacher, [n.teacher for n in mined.negatives])
    suspects = {
        "suspected_by_score": _suspects(mined, by_score, mined.positive_scores),
        "suspected_by_teacher": _suspects(mined, by_teacher, mined.positive_teacher),
    }
    short_by = mined.wanted - len(mined.negatives)
    filled_up = sum(n.rank is None for n in mined.negatives)
    known = [margin for margin in by_score if margin is not None]
    judged = [margin for margin in by_teacher if margin is not None]
    counts = {
        "queries": 1,
        "negatives": len(mined.negatives),
        "filled_up": filled_up,
        "queries_filled_up": int(filled_up > 0),
        "short_by": short_by,
        "queries_short": int(short_by > 0),
        "positives": len(mined.positives),
        "positives_without_score": sum(score is None for score in mined.positive_scores),
        "compared_pairs": len(known),
        "judged_queries": int(bool(judged)),
        "judged_pairs": len(judged),
        "suspected_false_negatives": sum(map(_either_suspected, by_score, by_teacher)),
        "suspected_by_score": sum(margin <= 0 for margin in known),
        "suspected_by_teacher": sum(margin <= 0 for margin in judged),
    }
    return {
        "counts": counts,
        "dropped": mined.dropped,
        "histograms": {
            "negative_scores": _histogram(n.score for n in mined.negatives),
            "positive_scores": _histogram(mined.positive_scores),
            "margins": _histogram(by_score),
            "teacher_margins": _histogram(by_teacher),
        },
        **suspects,
        "short": [_shortage(mined, filled_up)] if short_by or filled_up else [],
    }


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything of several parts, in the order of the rows, but ranks and examples."""
    short = [entry for part in parts for entry in part["short"]]
    return {
        "counts": {name: sum(part["counts"][name] for part in parts) for name in COUNTS},
        "dropped": _added(part["dropped"] for part in parts),
        "histograms": {name: _added(part["histograms"][name] for part in parts) for name in HISTOGRAMS},
        **{name: _worst(entry for part in parts for entry in part[name]) for name in SUSPECTS},
        # sorting is stable: within both kinds the order of the rows stays
        "short": sorted(short, key=lambda entry: entry["negatives"] == entry["wanted"])[:LISTED],
    }


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for own in counts:
        total.update(own)
    return dict(total)


def _worst(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: (entry["margin"], entry["query_id"], entry["negative"]["id"]))[:LISTED]


def _margins(positives: Sequence[float | None], negatives: Sequence[float | None]) -> list[float | None]:
    """How far each negative scores below the lowest known positive; None where one of them is unknown."""
    lowest = min((score for score in positives if score is not None), default=None)
    return [None if lowest is None or score is None else lowest - score for score in negatives]


def _either_suspected(by_score: float | None, by_teacher: float | None) -> bool:
    return any(margin is not None and margin <= 0 for margin in (by_score, by_teacher))


def _suspects(
    mined: Mined, margins: Sequence[float | None], positive_scores: Sequence[float | None]
) -> list[dict[str, Any]]:
    """The LISTED worst pairs of a query, with the positive that scores lowest."""
    suspected = [
        (margin, n) for margin, n in zip(margins, mined.negatives, strict=True) if margin is not None and margin <= 0
    ]
    if not suspected:
        return []
    _, place = min((score, i) for i, score in enumerate(positive_scores) if score is not None)
    positive = _positive(mined, place)
    return _worst(
        {
            "query_id": mined.query_id,
            "query": _cut(mined.query),
            "positives": len(mined.positives),
            "positive": positive,
            "negative": _negative(negative),
            "margin": margin,
        }
        for margin, negative in suspected
    )


def _shortage(mined: Mined, filled_up: int) -> dict[str, Any]:
    return {
        "query_id": mined.query_id,
        "query": _cut(mined.query),
        "wanted": mined.wanted,
        "negatives": len(mined.negatives),
        "filled_up": filled_up,
        "dropped": mined.dropped,
    }


def _example(mined: Mined) -> dict[str, Any]:
    """A query with the first of its positives and negatives, and how many there are."""
    places = range(min(len(mined.positives), POSITIVES_LISTED))
    return {
        "query_id": mined.query_id,
        "query": _cut(mined.query),
        "num_positives": len(mined.positives),
        "positives": [_positive(mined, place) for place in places],
        "num_negatives": len(mined.negatives),
        "negatives": [_negative(negative) for negative in mined.negatives[:NEGATIVES_LISTED]],
    }


def _positive(mined: Mined, place: int) -> dict[str, Any]:
    return {
        "id": mined.positive_ids[place] if mined.positive_ids else None,
        "text": _cut(mined.positives[place]),
        "score": mined.positive_scores[place],
        "teacher": mined.positive_teacher[place],
    }


def _negative(negative: Negative) -> dict[str, Any]:
    return {
        "id": negative.id,
        "text": _cut(negative.text),
        "rank": negative.rank,
        "score": negative.score,
        "teacher": negative.teacher,
    }


def _histogram(values: Iterable[float | None]) -> dict[str, int]:
    return Counter(_bin(value) for value in values if value is not None)


def _bin(value: float) -> str:
    rounded = round(value, 3) + 0.0  # adding 0 makes -0.0 zero, which would be a bin of its own
    return f"{rounded:.3f}" if abs(rounded) < 1 else f"{value:.3g}"


def _values(histogram: dict[str, int]) -> list[tuple[float, int]]:
    return sorted((float(value), count) for value, count in histogram.items())


def _mean(histogram: dict[str, int]) -> float | None:
    total = sum(histogram.values())
    # in the order of the values: that of the units would show in the last digit
    return sum(value * count for value, count in _values(histogram)) / total if total else None


def _median(histogram: dict[str, int]) -> float | None:
    if not histogram:
        return None
    values, counts = zip(*_values(histogram), strict=True)
    up_to = np.cumsum(counts)
    lower, upper = np.searchsorted(up_to, [(up_to[-1] - 1) // 2, up_to[-1] // 2], side="right").tolist()
    return float(values[lower] + values[upper]) / 2


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else f"{text[: TEXT_LIMIT - 1]}…"
