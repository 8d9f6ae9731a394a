"""Positives that a query has in other rows: in the triplet form a query has a row for each of its positives."""

from collections.abc import Callable, Iterable

import numpy as np

from rayembed.data.store import Hashes, Int64s, Row, Store, hash_texts

JOINED = ("pos", "pos_ids", "related_ids")


class RepeatedQueries:
    """Finds the rows that have the same query text; holds 16 bytes for each row whose query is in more than one.

    Args:
        rows: training rows.
        same: queries that it maps to one text are the same query.
    """

    def __init__(self, rows: Store, same: Callable[[str], str]) -> None:
        self._store, self._same = rows, same
        hashes = [self._hashes(table.column("query").to_pylist()) for table in rows.iter_parts(["query"])]
        found = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        order = np.argsort(found, kind="stable")
        ordered = found[order]
        alike = np.zeros(len(ordered) + 1, np.bool_)
        alike[1:-1] = ordered[1:] == ordered[:-1]
        repeated = alike[:-1] | alike[1:]
        self._found: Hashes = ordered[repeated]
        self._rows: Int64s = order[repeated].astype(np.int64)

    def with_positives_of_all(self, rows: list[Row]) -> list[Row]:
        """The given rows, with `pos`, `pos_ids` and `related_ids` of every row that has their query.

        Whatever their prompts. An id may then be in both lists of ids, as another row may judge it otherwise.

        Reads the other rows of these queries, so give rows of one part at a time.
        """
        hashes = self._hashes(row["query"] for row in rows)
        starts = np.searchsorted(self._found, hashes, side="left")
        ends = np.searchsorted(self._found, hashes, side="right")
        wanted = np.unique(np.concatenate([self._rows[a:b] for a, b in zip(starts, ends, strict=True)]))
        others: dict[str, list[Row]] = {}
        for other in self._store.take(wanted, ["query", *JOINED]).to_pylist():
            others.setdefault(self._same(other["query"]), []).append(other)
        return [self._joined(row, others.get(self._same(row["query"]), [])) for row in rows]

    def _joined(self, row: Row, others: list[Row]) -> Row:
        joined = {
            column: list(dict.fromkeys(item for one in (row, *others) for item in one[column] or ()))
            for column in JOINED
        }
        return {**row, **joined}

    def _hashes(self, queries: Iterable[str]) -> Hashes:
        return hash_texts(self._same(query) for query in queries)
