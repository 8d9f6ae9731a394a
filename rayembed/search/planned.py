"""Memory and disk of a search, known before it starts: it depends on the settings, hardly on the corpus."""

from dataclasses import dataclass

from rayembed.config.search import SearchConfig
from rayembed.search.backends import SCORE_BLOCK_BYTES, is_exact
from rayembed.search.exact import QUERIES_PER_SEARCH
from rayembed.search.merge import SHARDS_AT_ONCE

FIXED_BYTES = 16 << 20  # of blocks that do not grow: FAISS's, and those of passages that are scored again
TOP_BYTES = 12  # of a found passage: a float32 score and an int64 row
MERGED_BYTES = 64  # of a passage while it is merged: itself, its copy, its place in the order, its score in order, ...


@dataclass(frozen=True)
class Planned:
    """Upper bounds, in bytes."""

    search_worker: int
    """Memory of a search worker beyond its interpreter and libraries."""

    merge_worker: int
    """Memory of what merges rankings, beyond the same."""

    disk: int
    """What the search leaves in the cache."""

    parts: dict[str, int]
    """What `search_worker` is the sum of."""

    def in_words(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in self.parts.items())
        return (
            f"search: at most {_megabytes(self.search_worker)} a worker ({parts}); "
            f"merge: {_megabytes(self.merge_worker)}; {_megabytes(self.disk)} on disk"
        )


def planned_memory(
    *, passages: int, queries: int, dimension: int, k: int, search: SearchConfig, merge_queries: int
) -> Planned:
    """What a search of Q queries in P passages of D dimensions takes.

    With p = min(search.passages_per_index, search.passages_per_unit, P) passages in memory at once and
    q = min(search.queries_per_unit, Q) queries:

    - vectors of passages: 2 x 4 p D bytes (the mapped files, and the copy); ivf and hnsw hold their index as well,
      4 p D and 8 p (ivf) or 4 p (2 M + 4) for hnsw with M links
    - vectors of queries: 2 x 4 q D
    - best so far: 3 x 12 q k (that, what the piece gave, and both merged)
    - at work: 64 bytes x 2 k for each of at most 1024 queries, and 16 MiB of blocks that do not grow; with torch
      also two of its blocks of scores

    A merge holds 9 shards' k best for `merge_queries` queries, 64 bytes each. On disk are 12 bytes for each query and
    each of the k best of every shard, and for ivf and hnsw the indexes. On a GPU passages and scores lie there too.
    """
    approximate = not is_exact(search)
    piece = min(search.passages_per_index, passages)
    piece = piece if approximate else min(piece, search.passages_per_unit)
    asked, at_once = min(search.queries_per_unit, queries), min(QUERIES_PER_SEARCH, search.queries_per_unit, queries)
    links = {"ivf": 8, "hnsw": 4 * (2 * search.hnsw_neighbors + 4)}.get(search.backend, 0)
    indexed = (4 * dimension + links) if approximate else 0
    shard = max(search.passages_per_unit, piece)
    shards, found = -(-passages // shard), min(k, passages)
    parts = {
        "passages": piece * (2 * 4 * dimension + indexed),
        "queries": 2 * 4 * asked * dimension,
        "best so far": 3 * TOP_BYTES * asked * found,
        "at work": MERGED_BYTES * 2 * found * at_once
        + FIXED_BYTES
        + (min(2 * SCORE_BLOCK_BYTES["cpu"], 4 * at_once * piece) if search.backend == "torch" else 0),
    }
    return Planned(
        search_worker=sum(parts.values()),
        merge_worker=MERGED_BYTES * merge_queries * found * min(shards, SHARDS_AT_ONCE + 1),
        disk=TOP_BYTES * queries * shards * min(found, shard) + passages * indexed,
        parts=parts,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):,.1f} MB"
