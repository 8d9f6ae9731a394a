"""The choice of negatives: for every training row, from its pool, in the order of the rows.

One process goes through all rows, because a passage may serve few queries only (mine.max_uses) and who comes first must
not depend on how rows are cut into units. It reads arrays, a part at a time; texts only of rows that are filled up.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayembed.data.repeated_queries import RepeatedQueries
from rayembed.data.store import Row
from rayembed.jobs.pool_files import Chosen, Judged, Pools
from rayembed.jobs.pool_files import known as known_score
from rayembed.jobs.pools import Mining, Passages, query_of
from rayembed.mining.filters import Candidates, apply_filters, filters_of, same_text
from rayembed.mining.selection import Uses, choose, query_seed
from rayembed.tracking.progress import Progress

FILL_UP_DRAWS = 20  # a small corpus may have no more; so many draws then say so
FILL_UP_STREAM = 1  # of a query's random numbers; its pool's order is drawn from another
LATE = ("not_judged", "denoised", "max_uses")  # why candidates of a pool are passed over, after the filters


def choose_all(mining: Mining, pools: Path, judged: Path | None, folder: Path) -> Uses:
    """Chooses for all rows and writes a file a part.

    Args:
        mining: what is read.
        pools: folder of the pools.
        judged: folder of what the teacher says of them. None: it was not asked.
        folder: that is written to.

    Returns:
        How often each passage was chosen.
    """
    folder.mkdir(exist_ok=True)
    uses = Uses(mining.corpus.num_rows, mining.config.max_uses)
    progress = Progress("choose negatives", mining.rows.num_rows, unit="queries", done=0)
    fill_up = FillUp(mining) if mining.config.fill_up else None
    for part in range(len(mining.rows.parts)):
        of_part = Pools.load(pools, part)
        verdict = None if judged is None else Judged.load(judged, part)
        _choose_part(mining, part, of_part, verdict, uses, fill_up).save(folder, part)
        progress.add(mining.rows.parts[part].num_rows)
    return uses


def _choose_part(
    mining: Mining, part: int, pools: Pools, judged: Judged | None, uses: Uses, fill_up: "FillUp | None"
) -> Chosen:
    number = mining.config.negative_number
    rows, ranks, scores, dropped = [], [], [], []
    for i in range(len(pools.offsets) - 1):
        own = pools.of(i)
        places, late = _choose(pools.rows[own], pools.order[own], judged, own, i, uses, number)
        taken = pools.rows[own][places]
        uses.count(taken)
        missing = number - len(taken)
        filled, their_scores = np.empty(0, np.int64), np.empty(0, np.float32)
        if missing and fill_up is not None:
            filled, their_scores = fill_up.draw(part, i, pools, missing, uses)
            uses.count(filled)
        rows.append(np.concatenate([taken, filled]))
        ranks.append(np.concatenate([pools.ranks[own][places], np.full(len(filled), -1)]))
        scores.append(np.concatenate([pools.scores[own][places], their_scores]))
        dropped.append(late)
    return Chosen(
        offsets=np.concatenate([[0], np.cumsum([len(own) for own in rows])]).astype(np.int64),
        rows=np.concatenate(rows).astype(np.int64),
        ranks=np.concatenate(ranks).astype(np.int64),
        scores=np.concatenate(scores).astype(np.float32),
        dropped=np.array(dropped, np.int64),
    )


def _choose(
    rows: NDArray[np.int64],
    order: NDArray[np.int64],
    judged: Judged | None,
    own: slice,
    row: int,
    uses: Uses,
    number: int,
) -> tuple[NDArray[np.int64], list[int]]:
    """Places of the chosen candidates in a row's pool, by rank, and how many were passed over for each of LATE."""
    allowed, not_judged = np.ones(len(rows), np.bool_), 0
    if judged is not None:
        allowed = judged.allowed(own, row)
        not_judged = int(np.isnan(judged.scores[own]).sum())
    free = uses.free(rows)
    places = choose(order, allowed & free, number)
    return places, [not_judged, int((~allowed).sum()) - not_judged, int((allowed & ~free).sum())]


class FillUp:
    """Random passages of the corpus for rows whose pool holds too few, of those that the filters would leave."""

    def __init__(self, mining: Mining) -> None:
        self._mining = mining
        filters = filters_of(mining.config)
        self._filters = {name: filters[name] for name in filters if name != "min_score"}  # any is better than none
        self._repeated: RepeatedQueries | None = None
        self._part, self._known = -1, list[Row]()

    def draw(
        self, part: int, row: int, pools: Pools, number: int, uses: Uses
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """At most `number` passages' rows and scores, seeded by the query.

        None of the row's pool, which is taken already or was passed over, and none that scores like a passage before
        the window: what a filter or the teacher found suspect must not come back by chance.
        """
        known, corpus = self._row(part, row), self._mining.corpus
        number_of_row = self._mining.rows.parts[part].first_row + row
        vector = self._mining.queries.rows(number_of_row, number_of_row + 1)[0]
        rng = np.random.default_rng([*query_seed(self._mining.experiment.seed, known["query_id"]), FILL_UP_STREAM])
        query = query_of(known, known_score(pools.positive[row]))
        met = {same_text(text) for text in Passages(corpus, pools.rows[pools.of(row)]).of(pools.rows[pools.of(row)])[1]}
        found, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for _ in range(FILL_UP_DRAWS):
            if len(found) == number:
                break
            drawn = rng.integers(corpus.num_rows, size=number - len(found) + 4)
            drawn = drawn[uses.free(drawn)]
            ids, texts = Passages(corpus, drawn).of(drawn)
            products = np.einsum("pd,d->p", self._mining.passages.take(drawn), vector)
            fresh = Candidates(drawn, ids, texts, np.full(len(drawn), -1), products)
            new = np.array([same_text(text) not in met for text in texts], np.bool_)
            left, _ = apply_filters(self._filters, query, fresh.keep(new & (products < pools.ceiling[row])))
            found = np.concatenate([found, left.rows])[:number]
            scores = np.concatenate([scores, left.scores])[:number]
            met |= {same_text(text) for text in left.texts}
        return found, scores

    def _row(self, part: int, row: int) -> Row:
        if part != self._part:
            self._repeated = self._repeated or RepeatedQueries(self._mining.rows, same_text)
            table = self._mining.rows.read_part(part).to_pylist()
            self._part, self._known = part, self._repeated.with_positives_of_all(table)
        return self._known[row]
