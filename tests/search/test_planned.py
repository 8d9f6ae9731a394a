"""Planned memory is an upper bound, and no more than twice what is taken."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rayembed.config.search import SearchConfig
from rayembed.search.planned import Planned, planned_memory

PEAK = """
def peak():  # of this program; ru_maxrss counts from that of the process that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
"""
SEARCH = """
import sys
import faiss, numpy as np
from rayembed.search.backends import open_index
from rayembed.search.exact import top_k
from rayembed.search.merge import merge_top_k

file, backend, queries, k = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
faiss.omp_set_num_threads(1)
few = np.ones((64, 8), np.float32)
top_k(few, few, lambda rows: rows, 4, index=open_index(backend, few))
before = peak()
asked = np.concatenate([np.load(file, mmap_mode="r")[:queries]])
best = None

def of_piece():
    passages = np.concatenate([np.load(file, mmap_mode="r")])
    return top_k(asked, passages, lambda rows: rows, k, index=open_index(backend, passages))

for _ in range(2):
    found = of_piece()
    if best is not None:
        merged = [merge_top_k(*zip(*[(s[i:i+1024], r[i:i+1024]) for s, r in (best, found)]), k, lambda rows: rows)
                  for i in range(0, queries, 1024)]
        best = tuple(np.concatenate(parts) for parts in zip(*merged))
    best = best or found
print(peak() - before)
"""
MERGE = """
import sys
import numpy as np
from rayembed.search.merge import fold_top_k
queries, k, shards = map(int, sys.argv[1:])
def top(n, queries, k):
    rng = np.random.default_rng(n)
    return -np.sort(-rng.random((queries, k), np.float32)), rng.integers(10**6, size=(queries, k)) + n * 10**6
fold_top_k((top(i, 2, 2) for i in range(3)), 2, lambda rows: rows)
before = peak()
fold_top_k((top(i, queries, k) for i in range(shards)), k, lambda rows: rows)
print(peak() - before)
"""


def measured(code: str, *arguments: object) -> int:
    words = [sys.executable, "-c", PEAK + code, *map(str, arguments)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def planned(passages: int, queries: int, dimension: int, k: int, merge_queries: int = 1, **search: object) -> Planned:
    config = SearchConfig(**search)  # type: ignore[arg-type]
    return planned_memory(
        passages=passages, queries=queries, dimension=dimension, k=k, search=config, merge_queries=merge_queries
    )


@pytest.mark.parametrize(
    ("backend", "passages", "queries", "k"),
    [("flat", 65536, 500, 100), ("flat", 8192, 6000, 200), ("torch", 8192, 2000, 50)],
)
def test_a_search_takes_no_more_than_planned(backend: str, passages: int, queries: int, k: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "v.npy", rng.standard_normal((passages, 256), np.float32))
    bound = planned(10 * passages, queries, 256, k, passages_per_index=passages, backend=backend).search_worker
    taken = measured(SEARCH, tmp_path / "v.npy", backend, queries, k)
    assert bound / 2 <= taken <= bound, f"{taken / 1e6:.0f} MB of {bound / 1e6:.0f} MB planned"


@pytest.mark.parametrize(("queries", "k", "shards"), [(512, 210, 30), (4000, 100, 12), (2000, 300, 4)])
def test_a_merge_takes_no_more_than_planned(queries: int, k: int, shards: int) -> None:
    bound = planned(
        shards * 10_000, queries, 8, k, merge_queries=queries, passages_per_unit=10_000, passages_per_index=10_000
    ).merge_worker
    taken = measured(MERGE, queries, k, shards)
    assert bound / 2 <= taken <= bound, f"{taken / 1e6:.0f} MB of {bound / 1e6:.0f} MB planned"


def test_memory_does_not_grow_with_the_corpus_or_the_queries_and_disk_does() -> None:
    small, large = planned(10**6, 10**5, 384, 200, 512), planned(10**8, 10**6, 384, 200, 512)
    assert small.search_worker == large.search_worker < 1e9
    assert planned(10**7, 10**5, 384, 200, 512).merge_worker == large.merge_worker
    assert small.disk == 12 * 10**5 * 200 * 4  # shards of 262,144
    assert large.disk == 12 * 10**6 * 200 * 382


@pytest.mark.parametrize("backend", ["ivf", "hnsw"])
def test_approximate_indexes_are_counted(backend: str) -> None:
    flat, approximate = planned(10**6, 10**5, 384, 200), planned(10**6, 10**5, 384, 200, backend=backend)
    assert approximate.disk - flat.disk > 4 * 384 * 10**6
    assert approximate.search_worker - flat.search_worker > 4 * 384 * 65536


def test_words() -> None:
    words = planned(10**6, 10**5, 384, 200, 512).in_words()
    assert words.startswith("search: at most ")
    assert "a worker (passages 201.3 MB, queries 25.2 MB, " in words
    assert words.endswith("; 960.0 MB on disk")
