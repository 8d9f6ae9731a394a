"""How much of an exact search an approximate one found, on a sample of the queries."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rayembed.config import Experiment
from rayembed.jobs.ranking import RECORD, ShardTops, search_shards
from rayembed.jobs.vector_files import Vectors


def measure_recall(
    experiment: Experiment, queries: Vectors, passages: Vectors, tops_folder: Path, k: int, *, use_gpu: bool = False
) -> dict[str, Any]:
    """Searches a sample of the queries exactly and compares; of an exact search, says so without searching.

    Args:
        experiment: section search, the seed that draws the sample, resources.
        queries: vectors of all queries.
        passages: vectors of the corpus.
        tops_folder: what `search_shards` gave for them.
        k: passages a query that are compared.
        use_gpu: search exactly on a GPU of each worker.

    Returns:
        backend; and exact: true, or recall_at (k, cut to the corpus), recall (mean share of the k best, 0 to 1; a
        passage that scores as the k-th counts as found) and queries (how many were compared).
    """
    record = json.loads((tops_folder / RECORD).read_text())
    if record["exact"]:
        return {"backend": record["backend"], "exact": True}
    number = queries.store.num_rows
    rng = np.random.default_rng(experiment.seed)
    sample = np.sort(rng.choice(number, min(experiment.search.recall_queries, number), replace=False)).tolist()
    exact = search_shards(experiment, queries, passages, k, use_gpu=use_gpu, exact=True, sample=sample)
    best = ShardTops(exact, passages.store).merged(0, len(sample), k)
    approximate = ShardTops(tops_folder, passages.store)
    shares = []
    for row, (scores, _) in zip(sample, best, strict=True):
        found, _ = approximate.merged(row, row + 1, k)[0]
        shares.append(np.count_nonzero(found >= scores[-1]) / len(scores))  # both are scored alike, to the last bit
    return {
        "backend": record["backend"],
        "recall_at": min(k, passages.store.num_rows),
        "recall": float(np.mean(shares)),
        "queries": len(sample),
    }
