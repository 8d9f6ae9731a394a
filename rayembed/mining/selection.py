"""Which candidates become a query's negatives: drawn with a seed that knows the query and nothing else."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def query_seed(seed: int, query_id: str) -> list[int]:
    """Seed of one query's draws: the same on any machine, worker, and order of queries."""
    digest = hashlib.sha256(query_id.encode()).digest()
    return [seed, *np.frombuffer(digest[:16], np.uint32).tolist()]


def draw_order(ranks: NDArray[np.int64], *, strategy: str, rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of candidates in the order in which they are taken.

    Args:
        ranks: [n], of the candidates that are left, best first.
        strategy: random: any order is as likely; top: by rank; weighted: one after the other without replacement, each
            with weight 1 / (1 + place) among those not taken yet.
        rng: of this query.

    Returns:
        [n]: 0 to n - 1, each once.

    Raises:
        ValueError: another strategy.
    """
    if strategy == "random":
        return rng.permutation(len(ranks))
    if strategy == "top":
        return np.argsort(ranks, kind="stable")
    if strategy == "weighted":
        # Exponential times with rates 1 / (1 + place) end in that order (Efraimidis and Spirakis 2006, weighted random
        # sampling with a reservoir).
        return np.argsort(rng.exponential(size=len(ranks)) * np.arange(1, len(ranks) + 1), kind="stable")
    raise ValueError(f"mine.sampling_strategy: found {strategy!r}, allowed: random, top, weighted")


class Uses:
    """How often each passage of the corpus was chosen: 4 bytes a passage.

    Args:
        num_rows: passages of the corpus.
        limit: times that a passage may be chosen. None: no limit.
    """

    def __init__(self, num_rows: int, limit: int | None) -> None:
        self._counts = np.zeros(num_rows, np.uint32)
        self._limit = limit

    def free(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each row [n] of the corpus was chosen less often than the limit."""
        return np.ones(len(rows), np.bool_) if self._limit is None else self._counts[rows] < self._limit

    def count(self, rows: NDArray[np.int64]) -> None:
        """Note that each row [n] was chosen once more."""
        np.add.at(self._counts, rows, 1)

    def most_used(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """At most `number` rows [n] that were chosen most often, and how often [n]: most first, ties by row."""
        used = np.flatnonzero(self._counts)
        counts = self._counts[used].astype(np.int64)
        if len(used) > number:  # sort only those that can be among them
            enough = counts >= np.partition(counts, -number)[-number]
            used, counts = used[enough], counts[enough]
        order = np.argsort(-counts, kind="stable")[:number]
        return used[order], counts[order]

    def summary(self) -> dict[str, float]:
        """`passages` that were chosen at all, how often their `median` was, and how often the `most` chosen one."""
        used = self._counts[self._counts > 0]
        median = float(np.median(used)) if len(used) else 0.0
        return {"passages": len(used), "median": median, "most": int(used.max(initial=0))}


def choose(order: NDArray[np.int64], allowed: NDArray[np.bool_], number: int) -> NDArray[np.int64]:
    """The first `number` allowed places of the order (all, if there are no more), ascending and so by rank.

    Args:
        order: [n], as `draw_order` gives it.
        allowed: [n], by place.
        number: how many.
    """
    return np.sort(order[allowed[order]][:number])
