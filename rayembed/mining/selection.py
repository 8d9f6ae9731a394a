"""Which candidates become a query's negatives: drawn with a seed that knows the query and nothing else."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rayembed.mining.filters import Candidate, Query, Seen, drop_reason


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The negatives of one query, in the order of their rank, and what happened on the way."""

    negatives: list[Candidate]
    filled_up: int
    dropped: Counter[str]
    short_by: int


def query_seed(seed: int, query_id: str) -> list[int]:
    """Seed of one query's draws: the same on any machine, worker, and order of queries."""
    digest = hashlib.sha256(query_id.encode()).digest()
    return [seed, *np.frombuffer(digest[:16], np.uint32).tolist()]


def select(
    query: Query,
    candidates: Sequence[Candidate],
    *,
    number: int,
    seed: Sequence[int],
    draw: Callable[[np.random.Generator, int], Sequence[Candidate]] | None,
) -> Selection:
    """Filters the candidates and draws `number` of them.

    Args:
        query: the query and its positives.
        candidates: of the window of ranks, best first.
        number: negatives wanted.
        seed: of this query's draws.
        draw: gives some random passages of the corpus, to fill up where the window holds too few. None: no fill-up.
    """
    seen, dropped, kept = Seen(), Counter[str](), list[Candidate]()
    for candidate in candidates:
        reason = drop_reason(query, candidate, seen)
        if reason is None:
            kept.append(candidate)
        else:
            dropped[reason] += 1
    rng = np.random.default_rng(list(seed))
    if len(kept) > number:
        chosen = np.sort(rng.choice(len(kept), number, replace=False))
        kept = [kept[i] for i in chosen]
    found = len(kept)
    for _ in range(20 if draw is not None else 0):  # a small corpus may have no more; 20 draws then say so
        missing = number - len(kept)
        if missing == 0:
            break
        assert draw is not None
        fresh = [c for c in draw(rng, missing + 4) if drop_reason(query, c, seen) is None]
        kept += fresh[:missing]
    return Selection(negatives=kept, filled_up=len(kept) - found, dropped=dropped, short_by=number - len(kept))
