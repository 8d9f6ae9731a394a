"""Keys of pairs, runs of scores and their merge, against plain dictionaries; no Ray."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rayembed.jobs import pair_scores
from rayembed.jobs.pair_scores import RUNS, Keys, PairScores, SeenKeys, pair_keys, publish, write_run


def keys_of(*pairs: tuple[int, int]) -> Keys:
    return np.array(pairs, np.uint64).reshape(-1, 2).T


def random_keys(count: int, seed: int) -> Keys:
    """Keys whose upper halves come up again and again."""
    rng = np.random.default_rng(seed)
    upper = rng.integers(2**64, size=max(count // 4, 1), dtype=np.uint64)
    return np.stack([rng.choice(upper, count), rng.permutation(count).astype(np.uint64) + np.uint64(seed << 32)])


def test_a_key_stands_for_one_pair_in_its_order() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("bc", "a"), ("ä", "b"), ("a", "\u0308b")]
    keys = pair_keys(pairs)
    assert (keys.shape, keys.dtype, keys.flags.c_contiguous) == ((2, 7), np.uint64, True)
    assert len({tuple(key) for key in keys.T.tolist()}) == len(pairs)
    np.testing.assert_array_equal(pair_keys(pairs[::-1]), keys[:, ::-1])
    assert len(set(keys[0].tolist())) == len(set(keys[1].tolist())) == len(pairs), "both halves tell pairs apart"
    assert pair_keys([]).shape == (2, 0)


def test_keys_that_share_a_half_are_not_the_same() -> None:
    seen = SeenKeys()
    assert seen.add(keys_of((1, 1), (1, 2), (1, 1))).tolist() == [False, False, True]
    assert seen.add(keys_of((3, 1), (1, 3), (1, 2), (3, 3))).tolist() == [False, False, True, True]


def test_keys_met_take_the_bytes_that_are_promised() -> None:
    rng, seen, count = np.random.default_rng(0), SeenKeys(), 200
    tracemalloc.start()
    for _ in range(count):
        seen.add(rng.integers(2**64, size=(2, 1000), dtype=np.uint64))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 17 * count * 1000
    assert peak < 33 * count * 1000


@pytest.mark.parametrize(("at_once", "pieces_at_once"), [(1, 64), (7, 64), (1 << 20, 64), (7, 3), (1 << 20, 2)])
def test_what_is_published_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, pieces_at_once: int
) -> None:
    monkeypatch.setattr(pair_scores, "PAIRS_MERGED_AT_ONCE", at_once)
    monkeypatch.setattr(pair_scores, "PIECES_MERGED_AT_ONCE", pieces_at_once)
    rng, expected = np.random.default_rng(0), dict[tuple[int, int], float]()
    for number in range(3):
        pieces = []
        for piece, size in enumerate((5, 0, 40, 1)):
            keys = random_keys(size, seed=10 * number + piece)
            scores = rng.normal(size=size).astype(np.float32)
            pieces.append(tmp_path / f"piece-{number}-{piece}")
            write_run(pieces[-1], keys, scores)
            expected |= dict(zip(map(tuple, keys.T.tolist()), scores.tolist(), strict=True))
        publish(pieces, tmp_path, f"run{number}")
    cache = PairScores(tmp_path)
    for folder in (tmp_path / RUNS).iterdir():
        upper, lower = np.load(folder / "keys.npy")
        assert list(zip(upper, lower, strict=True)) == sorted(zip(upper, lower, strict=True))
    wanted = keys_of(*expected)
    assert cache.of_keys(wanted).tolist() == list(expected.values())
    assert np.isnan(cache.of_keys(np.stack([wanted[0], wanted[1] + np.uint64(1 << 60)]))).all()
    assert np.isnan(cache.of_keys(np.stack([wanted[0] + np.uint64(1), wanted[1]]))).all()


def test_many_pieces_are_merged_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 200 keys in slices of 10: each of 40 slices opens 4 pieces at most, not 200."""
    keys, scores = random_keys(400, seed=5), np.arange(400, dtype=np.float32)
    pieces = [tmp_path / f"piece-{i:03d}" for i in range(200)]
    for i, piece in enumerate(pieces):
        write_run(piece, keys[:, 2 * i : 2 * i + 2], scores[2 * i : 2 * i + 2])
    publish(pieces, tmp_path, "whole")
    opened: list[int] = []
    merge = pair_scores._merge

    def counting(some: Sequence[Path], folder: Path) -> None:
        opened.append(len(some))
        merge(some, folder)

    monkeypatch.setattr(pair_scores, "PAIRS_MERGED_AT_ONCE", 10)
    monkeypatch.setattr(pair_scores, "PIECES_MERGED_AT_ONCE", 4)
    monkeypatch.setattr(pair_scores, "_merge", counting)
    publish(pieces, tmp_path, "grouped")
    assert (sum(opened[:50]), sum(opened[50:63]), opened[63:]) == (200, 50, [4, 4, 4, 1, 4])
    whole, grouped = sorted((tmp_path / RUNS).iterdir())
    for name in ("keys.npy", "scores.npy"):
        assert (whole / name).read_bytes() == (grouped / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {RUNS, *(piece.name for piece in pieces)}


def test_what_a_killed_call_left_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed after the merge, or amid that of its groups; its pieces were others."""
    monkeypatch.setattr(pair_scores, "PIECES_MERGED_AT_ONCE", 2)
    pieces = [tmp_path / f"piece-{i}" for i in range(5)]
    for i, piece in enumerate(pieces):
        write_run(piece, keys_of((i, i)), np.array([i], np.float32))
    for left in (".run.merged", ".run.merged.groups/0-00000", ".run.merged.groups/0-00001.partial"):
        write_run(tmp_path / left, keys_of((9, 9)), np.array([9], np.float32))
    publish(pieces, tmp_path, "run")
    found = PairScores(tmp_path).of_keys(keys_of(*((i, i) for i in range(5)), (9, 9)))
    np.testing.assert_array_equal(found, [0, 1, 2, 3, 4, np.nan])
    assert {path.name for path in tmp_path.iterdir()} == {RUNS, *(piece.name for piece in pieces)}


def test_pairs_are_looked_up_in_their_order(tmp_path: Path) -> None:
    pairs = [("q", "b"), ("q", "a"), ("p", "a")]
    write_run(tmp_path / "piece", pair_keys(pairs), np.array([1, 2, 3], np.float32))
    publish([tmp_path / "piece"], tmp_path, "run")
    wanted = [pairs[2], pairs[0], ("q", "c"), pairs[2], pairs[1]]
    np.testing.assert_array_equal(PairScores(tmp_path).lookup(wanted), np.array([3, 1, np.nan, 3, 2], np.float32))


def test_a_score_that_was_published_stays(tmp_path: Path) -> None:
    """Two jobs at the same time may both score a pair: what was read from the first is read ever after."""
    for score, name in ((1, "z"), (2, "a"), (3, "m")):
        write_run(tmp_path / f"piece-{name}", keys_of((7, 7), (score, 1)), np.array([score, score], np.float32))
        publish([tmp_path / f"piece-{name}"], tmp_path, name)
    assert PairScores(tmp_path).of_keys(keys_of((7, 7), (2, 1), (3, 1))).tolist() == [1, 2, 3]


def test_a_cache_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert np.isnan(PairScores(tmp_path / "none").lookup([("q", "p")])).all()
