"""Queries of a batch with in-context examples out of the same batch, tokenised when the batch is built."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayembed.config.model import ModelConfig
from rayembed.data.in_context import draw_examples, have_examples
from rayembed.data.plan import choose_group
from rayembed.data.prompts import query_of_row
from rayembed.data.store import Store
from rayembed.data.tasks import CLASS, CLUSTERING
from rayembed.models.in_context import QueryReader

CLASSES = (CLASS, "symmetric_class")  # types whose answer is the name of a class
CATEGORISED = (CLASS, CLUSTERING)  # types whose label, where there is one, is the answer


@dataclass(frozen=True)
class Example:
    """A row as an example."""

    query: str
    """With its instruction."""

    response: str
    known: frozenset[str]
    """The query and all its positives, without instruction."""

    shows: frozenset[str]
    """What is read of the row, but for a class, which others of the class show too."""


@dataclass(frozen=True, kw_only=True)
class InContext:
    """Reads queries after examples. The rows' tokens on disk are those of queries without any."""

    rows: Store
    reader: QueryReader
    model: ModelConfig
    query_max_len: int
    seed: int

    def queries(
        self,
        own: Sequence[int],
        batch: NDArray[np.int64],
        *,
        kind: str | None,
        epoch: int,
        positives: Sequence[int | None],
    ) -> list[NDArray[np.int32]] | None:
        """Token ids of the rows' queries after examples; None where the dataset's queries have none.

        Args:
            own: rows of this worker.
            batch: rows of the batch over all workers: on any number of workers, a query has the same examples.
            kind: type of the dataset.
            epoch: of the dataset.
            positives: of each own row, the row that is its positive, where its positive is a row (type class).
        """
        icl = self.reader.icl
        if icl.max_examples == 0 or not have_examples(icl, kind):
            return None
        drawn = [draw_examples(self.seed, epoch, row, batch=batch, most=icl.max_examples) for row in own]
        known = self._examples({*own, *(other for _, others in drawn for other in others)}, epoch)
        chosen = [
            _fair(known[row], [known[other] for other in others if other != positive])[:wanted]
            for row, positive, (wanted, others) in zip(own, positives, drawn, strict=True)
        ]
        short = iter(self.reader.shortened([(one.query, one.response) for some in chosen for one in some]))
        before = [self.reader.joined([next(short) for _ in some]) for some in chosen]
        ids = self.reader.tokens([known[row].query for row in own], self.query_max_len, before)
        return [np.array(tokens, np.int32) for tokens in ids]

    def _examples(self, rows: set[int], epoch: int) -> dict[int, Example]:
        numbers = sorted(rows)
        table = self.rows.take(np.array(numbers, np.int64), ["query", "prompt", "pos", "type", "label"])
        return {row: self._example(row, epoch, **value) for row, value in zip(numbers, table.to_pylist(), strict=True)}

    def _example(
        self,
        row: int,
        epoch: int,
        *,
        query: str,
        prompt: str | None,
        pos: list[str],
        type: str | None,
        label: str | None,
    ) -> Example:
        if label is not None and type in CATEGORISED:
            response = label
        else:  # the positive that the row is trained with in this epoch
            response = pos[choose_group(self.seed, epoch, row, num_pos=len(pos), num_neg=0, group_size=1)[0]]
        shows = (query,) if type in CLASSES else (query, response)
        read = query_of_row(self.model, query, row_type=type, prompt=prompt)
        return Example(read, response, frozenset((query, *pos)), frozenset(shows))


def _fair(own: Example, others: Sequence[Example]) -> list[Example]:
    """The examples that show neither the query itself nor a positive of it."""
    return [other for other in others if not own.known & other.shows]
