"""The choice of negatives and the teacher's verdict before it, against slow rules in plain Python."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayembed.jobs import judging
from rayembed.jobs.choice import LATE, choose_all
from rayembed.jobs.judging import ChosenPairs, JudgeWorker, PoolPairs
from rayembed.jobs.pair_scores import pair_keys, write_run
from rayembed.jobs.pool_files import Chosen, Judged, Pools
from rayembed.jobs.pools import Mining
from rayembed.jobs.shipping import shipped
from rayembed.mining.selection import Uses
from tests.jobs.small_mining import World, product, row, texts
from tests.jobs.without_ray import do_units_here

NUM_ROWS, NUM_PASSAGES, NUMBER = 40, 30, 4
ROWS_PER_PART = 16  # of pairs to judge
TEXTS = texts(NUM_PASSAGES, seed=5)
IDS = [f"p{i:02d}" for i in range(NUM_PASSAGES)]


@pytest.fixture(autouse=True, scope="module")
def here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        do_units_here(patch)
        patch.setattr(judging, "ROWS_PER_PART", ROWS_PER_PART)
        yield


def world(cut: int = 1000, **settings: Any) -> World:  # noqa: ANN401 - of section mine
    """Rows whose positives are outside the corpus or in it; two of them ask the same."""
    asked = texts(NUM_ROWS, seed=6, words=3)
    rows = [row(i, asked[i], {f"x{i}": f"positive number {i}"}) for i in range(NUM_ROWS)]
    rows[7] = row(7, asked[7], {"p01": TEXTS[1], "p02": TEXTS[2]})
    rows[33] = row(33, asked[7].upper(), {"x33": "positive of another row", "p03": TEXTS[3]})
    passages = dict(zip(IDS, TEXTS, strict=True))
    chosen = {"negative_number": NUMBER, "range_for_sampling": "0-10", "fill_up": False, **settings}
    return World(rows, passages, (cut, 11), chosen)


def pools_of(mining: Mining, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Writes a pool of 0 to 9 passages a row, the same however rows are cut; gives rows and order of each."""
    rng, pools = np.random.default_rng(0), []
    for _ in range(NUM_ROWS):
        size = int(rng.integers(10))
        rows = rng.choice(12, size, replace=False)  # few passages, so that they are used up
        pools.append((rows.tolist(), rng.permutation(size).tolist()))
    folder.mkdir()
    for part, meta in enumerate(mining.rows.parts):
        own = pools[meta.first_row : meta.first_row + meta.num_rows]
        ends = np.cumsum([0, *(len(rows) for rows, _ in own)])
        Pools(
            offsets=ends.astype(np.int64),
            rows=np.array([place for rows, _ in own for place in rows], np.int64),
            ranks=np.array([2 * i for rows, _ in own for i in range(len(rows))], np.int64),
            scores=np.array([-i / 8 for rows, _ in own for i in range(len(rows))], np.float32),
            order=np.array([place for _, order in own for place in order], np.int64),
            positive_offsets=np.arange(len(own) + 1, dtype=np.int64),
            positive_scores=np.zeros(len(own), np.float32),
            positive=np.full(len(own), np.nan, np.float32),
            ceiling=np.full(len(own), np.inf, np.float32),
            dropped=np.zeros((len(own), 3), np.int64),
        ).save(folder, part)
    return pools


def one_pool(rows: Sequence[int], positive: float = np.nan, ceiling: float = np.inf) -> Pools:
    """The pool of one row."""
    places, none = np.array(rows, np.int64), np.zeros(2, np.int64)
    scores = np.zeros(len(rows), np.float32)
    known, highest = (np.array([value], np.float32) for value in (positive, ceiling))
    ends = np.array([0, len(rows)], np.int64)
    return Pools(ends, places, places, scores, places, none, scores[:0], known, highest, np.zeros((1, 1), np.int64))


def chosen_by(
    mining: Mining, folder: Path, pools: Path, judged: Path | None = None
) -> tuple[list[dict[str, Any]], Uses]:
    uses, rows = choose_all(mining, pools, judged, folder), []
    for part, meta in enumerate(mining.rows.parts):
        chosen = Chosen.load(folder, part)
        for i in range(meta.num_rows):
            own = chosen.of(i)
            rows.append(
                {
                    "rows": chosen.rows[own].tolist(),
                    "ranks": chosen.ranks[own].tolist(),
                    "scores": [None if np.isnan(score) else float(score) for score in chosen.scores[own]],
                    "late": dict(zip(LATE, chosen.dropped[i].tolist(), strict=True)),
                }
            )
    return rows, uses


def by_rule(
    pools: Sequence[tuple[list[int], list[int]]], limit: int | None, allowed: Sequence[list[bool]] | None = None
) -> tuple[list[list[int]], Counter[int]]:
    """Rows in their order take the first of their draw that may still be taken; negatives stand by rank."""
    used: Counter[int] = Counter()
    found = []
    for i, (rows, order) in enumerate(pools):
        taken: list[int] = []
        for place in order:
            may = allowed is None or allowed[i][place]
            if len(taken) < NUMBER and may and (limit is None or used[rows[place]] < limit):
                taken.append(place)
        used.update(rows[place] for place in taken)
        found.append([rows[place] for place in sorted(taken)])
    return found, used


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_rows_take_the_first_of_their_draw_and_passages_serve_so_many(limit: int | None, tmp_path: Path) -> None:
    results = []
    for cut in (1000, 1, 7):
        mining = world(cut, max_uses=limit).mining(tmp_path / str(cut))
        pools = pools_of(mining, tmp_path / str(cut) / "pools")
        rows, uses = chosen_by(mining, tmp_path / str(cut) / "chosen", tmp_path / str(cut) / "pools")
        expected, used = by_rule(pools, limit)
        assert [own["rows"] for own in rows] == expected
        assert uses.summary()["most"] == max(used.values())
        assert dict(zip(*(values.tolist() for values in uses.most_used(100)), strict=True)) == dict(used)
        for own, (places, _) in zip(rows, pools, strict=True):
            assert own["ranks"] == [2 * places.index(place) for place in own["rows"]]
            assert own["scores"] == [-places.index(place) / 8 for place in own["rows"]]
        results.append(rows)
    assert results[1] == results[2] == results[0]
    late = [own["late"] for own in results[0]]
    assert {own["not_judged"] + own["denoised"] for own in late} == {0}
    if limit is None:
        assert {own["max_uses"] for own in late} == {0}
    else:
        assert sum(own["max_uses"] for own in late) > 20, "the data must show what is tested"


def test_passed_over_for_max_uses_is_counted(tmp_path: Path) -> None:
    mining = world(max_uses=2).mining(tmp_path)
    pools = pools_of(mining, tmp_path / "pools")
    rows, _ = chosen_by(mining, tmp_path / "chosen", tmp_path / "pools")
    used: Counter[int] = Counter()
    for own, (places, _) in zip(rows, pools, strict=True):
        assert own["late"]["max_uses"] == sum(used[place] >= 2 for place in places)
        used.update(own["rows"])


@pytest.mark.parametrize("limit", [None, 6])
def test_filled_up_ones_are_new_allowed_and_within_max_uses(limit: int | None, tmp_path: Path) -> None:
    results = []
    for cut in (1000, 1, 7):
        made = world(cut, max_uses=limit, fill_up=True, negative_number=6)
        mining = made.mining(tmp_path / str(cut))
        pools = pools_of(mining, tmp_path / str(cut) / "pools")
        rows, uses = chosen_by(mining, tmp_path / str(cut) / "chosen", tmp_path / str(cut) / "pools")
        results.append(rows)
    assert results[1] == results[2] == results[0], "the draws are those of the query"
    used = Counter(place for own in rows for place in own["rows"])
    assert max(used.values()) <= (limit or 1000)
    assert uses.summary()["most"] == max(used.values())
    draws = set()
    for i, (own, (places, _)) in enumerate(zip(rows, pools, strict=True)):
        filled = [place for place, rank in zip(own["rows"], own["ranks"], strict=True) if rank == -1]
        known = own["rows"][: len(own["rows"]) - len(filled)]
        assert own["rows"] == known + filled, "by rank, those that fill up last"
        assert not {*places} & {*filled}, "nothing of the pool comes back by chance"
        asked = made.rows[i]["query"]
        assert own["scores"][len(known) :] == [product(asked, TEXTS[place]) for place in filled]
        assert len({*own["rows"]}) == len(own["rows"])
        assert len(known) == 6 or all(used[place] == limit for place in {*places} - {*known})
        if i in (7, 33):
            assert not {1, 2, 3} & {*filled}, "positives of any row with the query"
        if limit is None:
            assert len(own["rows"]) == 6
        draws.add(tuple(filled))
    assert len(draws) > 20, "the draws differ"
    if limit is not None:
        assert sum(len(own["rows"]) for own in rows) <= limit * NUM_PASSAGES
        assert min(len(own["rows"]) for own in rows) < 6, "the corpus is too small, and the last rows are short"


def test_another_seed_fills_up_with_others(tmp_path: Path) -> None:
    mining = world(fill_up=True, negative_number=6).mining(tmp_path)
    pools_of(mining, tmp_path / "pools")
    first, _ = chosen_by(mining, tmp_path / "first", tmp_path / "pools")
    other = replace(mining, experiment=replace(mining.experiment, seed=1))
    second, _ = chosen_by(other, tmp_path / "second", tmp_path / "pools")
    assert first != second
    for one, two in zip(first, second, strict=True):
        assert [rank for rank in one["ranks"] if rank >= 0] == [rank for rank in two["ranks"] if rank >= 0]


def test_filters_of_texts_hold_for_what_fills_up_and_all_that_is_left_is_found(tmp_path: Path) -> None:
    """A row that wants the whole corpus, and its pool holds one passage."""
    near = "one two three four five six"
    passages = {
        "in pool": TEXTS[0],
        "pool again": TEXTS[0].upper(),
        "positive": TEXTS[1],
        "copy of positive": f" {TEXTS[2].title()}",
        "after title": f"A title {TEXTS[2]}",
        "near": f"{near} seven",
        "far": f"{near} eight nine ten eleven twelve",
        "related": TEXTS[3],
        "query": "WHAT is it",
        "twice": TEXTS[4],
        "the second time": TEXTS[4],
        "of the other row": TEXTS[6],
        **{f"free {i}": text for i, text in enumerate(TEXTS[10:20])},
    }
    positives = {"positive": TEXTS[1], "x": TEXTS[2], "y": near}
    rows = [
        row(0, "what is it", positives, related_ids=["related"]),
        row(1, "what  is it", {"of the other row": TEXTS[6]}),
    ]
    settings = {"negative_number": 50, "range_for_sampling": "0-1", "near_duplicate": 0.6}
    mining = World(rows, passages, (1, 1000), settings).mining(tmp_path)
    for part, own in enumerate(([0], [])):
        one_pool(own).save(tmp_path, part)
    chosen, _ = chosen_by(mining, tmp_path / "chosen", tmp_path)
    names, ids = list(passages), [[list(passages)[place] for place in own["rows"]] for own in chosen]
    left = {"far", *(name for name in names if name.startswith("free"))}
    assert ids[0][0] == "in pool"
    assert {*ids[0][1:]} in ({*left, "twice"}, {*left, "the second time"})
    assert len(ids[0]) == 2 + len(left), "and no more: 38 are missing"
    assert {"in pool", "pool again"} & {*ids[1]}, "which is of the other row's pool"
    assert not {"positive", "copy of positive", "near", "related", "query", "of the other row"} & {*ids[1]}


BOUNDS: dict[str, tuple[dict[str, float], float, float, float]] = {  # and positive, ceiling, least score barred
    "max_score": ({"max_score": 0.25}, np.nan, np.inf, 0.3125),
    "absolute_margin": ({"absolute_margin": 0.125}, 0.25, np.inf, 0.1875),
    "relative_margin": ({"relative_margin": 0.5}, 0.25, np.inf, 0.1875),
    "before the window": ({}, np.nan, 0.125, 0.125),
    "min_score": ({"min_score": 0.5}, np.nan, np.inf, np.inf),
    "no positive is known": ({"absolute_margin": 0.125}, np.nan, np.inf, np.inf),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_what_scores_too_high_does_not_fill_up(name: str, tmp_path: Path) -> None:
    """Below mine.min_score it may be: any is better than none."""
    settings, positive, ceiling, barred = BOUNDS[name]
    passages = dict(zip(IDS, TEXTS, strict=True))
    query = "what is it"
    rows = [row(0, query, {"x": "elsewhere"})]
    given = {"negative_number": 50, "range_for_sampling": "0-1", "near_duplicate": None, **settings}
    mining = World(rows, passages, (1, 1000), given).mining(tmp_path)
    one_pool([], positive, ceiling).save(tmp_path, 0)
    chosen, _ = chosen_by(mining, tmp_path / "chosen", tmp_path)
    expected = [place for place, text in enumerate(TEXTS) if product(query, text) < barred]
    assert sorted(chosen[0]["rows"]) == expected
    scores = {product(query, text) for text in TEXTS}
    assert min(scores) < 0.25 <= max(scores), "the data must show what is tested"
    assert len(expected) < len(TEXTS) or barred == np.inf
    assert chosen[0]["scores"] == [product(query, TEXTS[place]) for place in chosen[0]["rows"]]


TEACHER = {"margin": (0.25, None), "bound": (None, 0.125), "both": (0.25, 0.125)}


def teacher(query: str, text: str) -> float:
    return product(text, query + "?")


def judged(mining: Mining, folder: Path, limit: int | None) -> Path:
    """What JudgeWorker leaves where the teacher has scored exactly the pairs that it should."""
    arguments: dict[str, Any] = {
        "rows": str(mining.rows.folder),
        "corpus": str(mining.corpus.folder),
        "pools": str(folder / "pools"),
        "limit": limit,
        "wording": None,
    }
    source = PoolPairs(**arguments)
    pairs = list({pair: None for part in range(-(-NUM_ROWS // ROWS_PER_PART)) for pair in source.pairs(part)})
    (folder / "cache" / "runs").mkdir(parents=True)
    scores = np.array([teacher(*pair) for pair in pairs], np.float32)
    write_run(folder / "cache" / "runs" / "00000", pair_keys(pairs), scores)
    worker = JudgeWorker(
        experiment=shipped(mining.experiment), scores=str(folder / "cache"), threads=1, use_gpu=False, **arguments
    )
    (folder / "judged").mkdir()
    for part in range(len(mining.rows.parts)):
        worker({"part": part}, f"part-{part:05d}", folder / "judged")
    return folder / "judged"


def test_pairs_to_judge_are_cut_the_same_however_rows_are(tmp_path: Path) -> None:
    """What shares a batch decides the last bits of a score under bfloat16."""
    found: list[list[list[tuple[str, str]]]] = []
    sample = [0, 6, 7, 8, *range(12, 33), 39]
    for cut in (1000, 7, 16):
        folder = tmp_path / str(cut)
        mining = world(cut).mining(folder)
        pools_of(mining, folder / "pools")
        folders: dict[str, Any] = {
            "rows": str(mining.rows.folder),
            "corpus": str(mining.corpus.folder),
            "wording": None,
        }
        source = PoolPairs(**folders, pools=str(folder / "pools"), limit=3)
        chosen_by(mining, folder / "chosen", folder / "pools")
        sampled = ChosenPairs(**folders, chosen=str(folder / "chosen"), sample=sample)
        found.append([*(source.pairs(part) for part in range(3)), *(sampled.pairs(part) for part in range(2))])
    assert found[1] == found[0]
    assert found[2] == found[0]
    asked = [own["query"] for own in world().rows]
    for part, rows in enumerate([range(16), range(16, 32), range(32, 40), sample[:16], sample[16:]]):
        assert list(dict.fromkeys(query for query, _ in found[0][part])) == [asked[i] for i in rows]


@pytest.mark.parametrize("name", TEACHER)
@pytest.mark.parametrize("which", ["lowest", "highest"])
@pytest.mark.parametrize("limit", [None, 3])
def test_the_teacher_drops_what_it_likes(name: str, which: str, limit: int | None, tmp_path: Path) -> None:
    margin, bound = TEACHER[name]
    made = world(7, denoise=True, denoise_margin=margin, denoise_max_score=bound, margin_positive=which, max_uses=5)
    made.settings["denoise_candidates"] = limit
    mining = made.mining(tmp_path)
    pools = pools_of(mining, tmp_path / "pools")
    verdict = judged(mining, tmp_path, limit)
    expected_scores, bounds, allowed, late = [], [], [], []
    for i, (own, (rows, order)) in enumerate(zip(made.rows, pools, strict=True)):
        positives = [*made.rows[7]["pos"], *made.rows[33]["pos"]] if i in (7, 33) else own["pos"]
        liked = [teacher(own["query"], text) for text in positives]
        limits = [] if margin is None else [{"lowest": min, "highest": max}[which](liked) - margin]
        bounds.append(min([*limits, *([] if bound is None else [bound])]))
        asked = {*order[:limit]}
        scores = [teacher(own["query"], TEXTS[place]) if at in asked else None for at, place in enumerate(rows)]
        expected_scores.append(scores)
        allowed.append([score is not None and score <= bounds[-1] for score in scores])
        late.append((scores.count(None), sum(score is not None and score > bounds[-1] for score in scores)))
    found = [Judged.load(verdict, part) for part in range(len(mining.rows.parts))]
    assert [bound for part in found for bound in part.bounds.tolist()] == bounds
    given = [None if np.isnan(score) else float(score) for part in found for score in part.scores]
    assert given == [score for scores in expected_scores for score in scores]
    rows_found, _ = chosen_by(mining, tmp_path / "chosen", tmp_path / "pools", verdict)
    expected, _ = by_rule(pools, 5, allowed)
    assert [own["rows"] for own in rows_found] == expected
    assert [(own["late"]["not_judged"], own["late"]["denoised"]) for own in rows_found] == late
    used: Counter[int] = Counter()
    for own, (rows, _), may in zip(rows_found, pools, allowed, strict=True):
        free = sum(used[place] >= 5 and yes for place, yes in zip(rows, may, strict=True))
        assert own["late"]["max_uses"] == free, "of those that the teacher leaves"
        used.update(own["rows"])
    assert sum(denoised for _, denoised in late) > 5, "the data must show what is tested"
    assert (sum(not_judged for not_judged, _ in late) > 5) == (limit is not None)


def test_which_of_several_positives_decides_shows_in_the_data(tmp_path: Path) -> None:
    made = world()
    for i in (7, 33):
        liked = [teacher(made.rows[i]["query"], text) for text in (*made.rows[7]["pos"], *made.rows[33]["pos"])]
        own = [teacher(made.rows[i]["query"], text) for text in made.rows[i]["pos"]]
        assert min(liked) < max(liked)
        assert (min(liked), max(liked)) != (min(own), max(own))


def test_what_the_teacher_dropped_does_not_fill_up(tmp_path: Path) -> None:
    made = world(7, denoise=True, denoise_margin=None, denoise_max_score=0.0, fill_up=True, denoise_candidates=5)
    mining = made.mining(tmp_path)
    pools = pools_of(mining, tmp_path / "pools")
    rows, _ = chosen_by(mining, tmp_path / "chosen", tmp_path / "pools", judged(mining, tmp_path, 5))
    filled = 0
    for own, (places, _) in zip(rows, pools, strict=True):
        drawn = [place for place, rank in zip(own["rows"], own["ranks"], strict=True) if rank == -1]
        assert not {*places} & {*drawn}
        assert len(own["rows"]) == NUMBER
        filled += len(drawn)
    assert filled > NUM_ROWS
