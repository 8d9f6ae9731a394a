"""Merging what shards found: by blocks of queries, exactly, in memory that does not grow with the shards; no Ray."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rayembed.data.store import PASSAGES, Store, StoreWriter
from rayembed.jobs.ranking import ShardTops, save_top, shard_name
from rayembed.search.merge import merge_top_k

QUERIES, MEASURED = 128, 100
PEAK = """
import resource, sys
from pathlib import Path
from rayembed.data.store import Store
from rayembed.jobs.ranking import ShardTops
for folder in map(Path, sys.argv[1:]):
    ShardTops(folder / "tops", Store.open(folder / "corpus")).merged(0, {queries}, {k})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def made_up(folder: Path, shards: int, found: int) -> Store:
    """A corpus of `found` passages a shard, and what a search of each shard could have found; some scores tie."""
    rng = np.random.default_rng(shards)
    writer = StoreWriter(folder / "corpus", PASSAGES, found)
    for number in rng.permutation(shards * found):
        writer.add({"id": f"d{number}", "text": "t"})
    (folder / "tops").mkdir()
    for shard in range(shards):
        scores = -np.sort(-rng.integers(0, 2**20, (QUERIES, found)), axis=1) / np.float32(2**20)
        rows = shard * found + rng.permuted(np.tile(np.arange(found), (QUERIES, 1)), axis=1)
        save_top(folder / "tops", shard_name(shard), scores.astype(np.float32), rows.astype(np.int64))
    return writer.finish()


@pytest.mark.parametrize("shards", [1, 7, 30])
def test_blocks_equal_the_merge_of_everything_at_once(tmp_path: Path, shards: int) -> None:
    corpus = made_up(tmp_path, shards, 9)
    ids = np.array([name for table in corpus.iter_parts(["id"]) for name in table.column("id").to_pylist()])
    files = [tmp_path / "tops" / shard_name(shard) for shard in range(shards)]
    scores, rows = merge_top_k(
        [np.load(f"{file}.scores.npy") for file in files],
        [np.load(f"{file}.rows.npy") for file in files],
        20,
        lambda rows: ids[rows],
    )
    tops = ShardTops(tmp_path / "tops", corpus)
    found = [top for first in range(0, QUERIES, 50) for top in tops.merged(first, min(first + 50, QUERIES), 20)]
    assert [own.tolist() for own, _ in found] == scores.tolist()
    assert [own.tolist() for _, own in found] == rows.tolist()
    assert not list((tmp_path / "tops").glob("*.partial*"))


def test_peak_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    """All of 400 shards at once are 61 MB before anything is done with them."""
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, shards in zip(folders, (40, 400), strict=True):
        folder.mkdir()
        made_up(folder, shards, MEASURED)
    code = PEAK.format(queries=QUERIES, k=MEASURED)
    found = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    few, many = (int(line) / 1024 for line in found.stdout.split())
    assert many - few < 20, f"{few:.0f} MiB over 40 shards, {many:.0f} MiB over 400"
