"""Pools against slow rules in plain Python: which candidates are left, why the others are not, how positives score."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayembed.config.mine import MineConfig
from rayembed.data.store import PASSAGES, Row, hash_texts
from rayembed.jobs.pool_files import Pools
from rayembed.jobs.pools import (
    Mining,
    PositiveScores,
    absent_positives,
    known_by_text,
    make_pools,
    measured_from,
    passage_key,
)
from rayembed.jobs.vector_files import Vectors
from rayembed.mining.filters import filters_of
from tests.jobs.small_mining import World, product, row, stored, texts, vector, with_vectors
from tests.jobs.without_ray import do_units_here

CORPUS = {f"p{(i * 37) % 70:02d}": text for i, text in enumerate(texts(70, seed=0))}
ELSEWHERE = texts(3, seed=1)
NEAR = "one two three four five six"


def world() -> World:
    """Positives in the corpus and absent from it, several, those of other rows; passages that read alike."""
    asked = texts(12, seed=2, words=3)
    passages = {
        **CORPUS,
        "copy": CORPUS["p05"],  # of a positive
        "titled": f"A Title {CORPUS['p06'].upper()}",
        "asked": asked[0],
        "near": f"{NEAR} seven",
        "other": f"{NEAR} eight nine ten eleven",
        "twice": CORPUS["p44"],
    }
    rows = [
        row(0, asked[0], {"p05": CORPUS["p05"]}),
        row(1, asked[1], {"p10": CORPUS["p10"], "p11": CORPUS["p11"], "p12": CORPUS["p12"]}),
        row(2, asked[2], {"e0": ELSEWHERE[0]}),
        row(3, asked[3], {"e1": ELSEWHERE[1], "p13": CORPUS["p13"], "e2": ELSEWHERE[2]}),
        row(4, "what is it", {"p14": CORPUS["p14"]}, related_ids=["p20"]),
        row(5, asked[5], {"p06": CORPUS["p06"]}, related_ids=["p21", "p22"]),
        row(6, asked[6], {"e3": NEAR}),
        row(7, asked[7], {"p15": CORPUS["p15"], "e0": ELSEWHERE[0]}, prompt="a prompt"),
        row(8, " What  IS it", {"p16": CORPUS["p16"], "e2": ELSEWHERE[2]}, related_ids=["p23"]),
        row(9, "what is it", {"p17": CORPUS["p17"], "p18": CORPUS["p18"]}),
        *(row(i, asked[i], {f"p{i}": CORPUS[f"p{i}"]}) for i in (10, 11)),
    ]
    return World(rows, passages)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"range_for_sampling": "0-76", "near_duplicate": None},
    "window": {"range_for_sampling": "3-40", "sampling_strategy": "top"},
    "near_duplicate": {"range_for_sampling": "0-76", "near_duplicate": 0.5, "sampling_strategy": "weighted"},
    "lowest": {"range_for_sampling": "2-70", "absolute_margin": 0.125},
    "highest": {"range_for_sampling": "2-70", "absolute_margin": 0.125, "margin_positive": "highest"},
    "relative": {"range_for_sampling": "0-50", "relative_margin": 0.25},
    "relative highest": {"range_for_sampling": "0-50", "relative_margin": 0.25, "margin_positive": "highest"},
    "bounds": {"range_for_sampling": "1-76", "min_score": -0.25, "max_score": 0.3125, "absolute_margin": 0},
}


@pytest.fixture(autouse=True)
def here() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        yield do_units_here(patch)


def alike(text: str) -> str:
    return " ".join(text.lower().split())


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def joined(rows: list[Row], own: Row) -> tuple[dict[str, str], set[str]]:
    """Positives by id, and related ids, of all rows with the query of one."""
    same = [other for other in rows if alike(other["query"]) == alike(own["query"])]
    positives = {name: text for other in same for name, text in zip(other["pos_ids"], other["pos"], strict=True)}
    return positives, {name for other in same for name in other.get("related_ids") or ()}


def reason(name: str, rank: int, own: Row, made: World, better: set[str]) -> str | None:
    """The first rule, in the order of filters.py, that forbids a passage."""
    settings, text, score = MineConfig(**made.settings), made.passages[name], product(own["query"], made.passages[name])
    positives, related = joined(made.rows, own)
    first, last = map(int, settings.range_for_sampling.split("-"))
    known = [product(own["query"], positive) for positive in positives.values()]
    base = min(known) if settings.margin_positive == "lowest" else max(known)
    overlap = max(
        len(grams(text) & grams(positive)) / len(grams(text) | grams(positive)) for positive in positives.values()
    )
    bounds = (settings.min_score, settings.max_score, settings.absolute_margin, settings.relative_margin)
    low, high, absolute, relative = bounds
    rules = {
        "rank_window": not first <= rank < last,
        "positive_id": name in positives,
        "related_id": name in related,
        "positive_text": alike(text) in map(alike, positives.values()),
        "positive_after_title": any(alike(text).endswith(" " + alike(positive)) for positive in positives.values()),
        "query_text": alike(text) == alike(own["query"]),
        "near_duplicate": settings.near_duplicate is not None and overlap >= settings.near_duplicate,
        "min_score": low is not None and score < low,
        "max_score": high is not None and score > high,
        "absolute_margin": absolute is not None and score > base - absolute,
        "relative_margin": relative is not None and score > base - abs(base) * relative,
        "repeated_text": alike(text) in better,
    }
    return next((rule for rule, holds in rules.items() if holds), None)


def expected(made: World, own: Row) -> tuple[list[tuple[str, int, float]], Counter[str]]:
    """Id, rank and score of the candidates that are left, and how many each rule forbids."""
    last = int(MineConfig(**made.settings).range_for_sampling.split("-")[1])
    ranked = sorted(made.passages, key=lambda name: (-product(own["query"], made.passages[name]), name))[:last]
    kept: list[tuple[str, int, float]] = []
    dropped: Counter[str] = Counter()
    for rank, name in enumerate(ranked):
        why = reason(name, rank, own, made, {alike(made.passages[other]) for other, *_ in kept})
        if why is None:
            kept.append((name, rank, product(own["query"], made.passages[name])))
        else:
            dropped[why] += 1
    return kept, dropped


def found(mining: Mining, folder: Path) -> list[dict[str, Any]]:
    """Each row's pool, whichever part it is in."""
    names = [name for table in mining.corpus.iter_parts(["id"]) for name in table.column("id").to_pylist()]
    filters, rows = list(filters_of(mining.config)), []
    for part, meta in enumerate(mining.rows.parts):
        pools = Pools.load(folder, part)
        for i in range(meta.num_rows):
            own = pools.of(i)
            values = zip(pools.rows[own].tolist(), pools.ranks[own].tolist(), pools.scores[own].tolist(), strict=True)
            rows.append(
                {
                    "pool": [(names[number], rank, score) for number, rank, score in values],
                    "order": pools.order[own].tolist(),
                    "positives": pools.positives_of(i),
                    "positive": float(pools.positive[i]),
                    "ceiling": float(pools.ceiling[i]),
                    "dropped": dict(zip(filters, pools.dropped[i].tolist(), strict=True)),
                }
            )
    return rows


@pytest.mark.parametrize("name", SETTINGS)
def test_pools_are_what_the_rules_leave(name: str, tmp_path: Path) -> None:
    made = replace(world(), settings=SETTINGS[name], cut=(5, 20))
    mining = made.mining(tmp_path)
    rows = found(mining, make_pools(mining))
    for own, pool in zip(made.rows, rows, strict=True):
        kept, dropped = expected(made, own)
        assert pool["pool"] == kept
        assert pool["dropped"] == dict.fromkeys(pool["dropped"], 0) | dropped
        last = int(mining.config.range_for_sampling.split("-")[1])
        assert sum(pool["dropped"].values()) + len(pool["pool"]) == min(last, len(made.passages)), "none is lost"
        assert sorted(pool["order"]) == list(range(len(kept)))
        if mining.config.sampling_strategy == "top":
            assert pool["order"] == list(range(len(kept)))
        assert pool["positives"] == [product(own["query"], text) for text in own["pos"]]
        everyones = [product(own["query"], text) for text in joined(made.rows, own)[0].values()]
        assert pool["positive"] == {"lowest": min, "highest": max}[mining.config.margin_positive](everyones)
        scores = sorted((product(own["query"], text) for text in made.passages.values()), reverse=True)
        first = int(mining.config.range_for_sampling.split("-")[0])
        assert pool["ceiling"] == (scores[first - 1] if first else math.inf)


def test_the_data_show_what_is_tested() -> None:
    """Every rule forbids something, and lowest and highest are not the same."""
    dropped: dict[str, Counter[str]] = {name: Counter() for name in SETTINGS}
    pools = {}
    for name, settings in SETTINGS.items():
        made = replace(world(), settings=settings)
        pools[name] = [expected(made, own) for own in made.rows]
        for _, counts in pools[name]:
            dropped[name] += counts
    assert set().union(*dropped.values()) == {
        *filters_of(MineConfig(min_score=0, max_score=0, absolute_margin=0, relative_margin=0))
    }
    for rows in ((1, 3, 4, 8, 9), (7,)):
        for i in rows:
            assert pools["lowest"][i] != pools["highest"][i]
    negative = [own for own in world().rows if min(product(own["query"], text) for text in own["pos"]) < 0]
    assert negative, "a relative margin to a negative score"


def test_pools_do_not_depend_on_how_anything_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for number, (cut, at_once) in enumerate([((1000, 1000), 64), ((1, 9), 64), ((5, 75), 2), ((7, 20), 3)]):
        monkeypatch.setattr("rayembed.jobs.pools.QUERIES_AT_ONCE", at_once)
        made = replace(world(), settings=SETTINGS["lowest"], cut=cut)
        mining = made.mining(tmp_path / str(number))
        results.append(found(mining, make_pools(mining)))
    assert all(result == results[0] for result in results[1:])
    orders = [row["order"] for row in results[0] if len(row["order"]) > 5]
    assert any(order != sorted(order) for order in orders), "they are shuffled"


def test_another_seed_or_id_draws_another_order(tmp_path: Path) -> None:
    made = replace(world(), settings=SETTINGS["plain"])
    mining = made.mining(tmp_path)
    first = found(mining, make_pools(mining))
    other = found(mining, make_pools(replace(mining, experiment=replace(mining.experiment, seed=7))))
    for one, two in zip(first, other, strict=True):
        assert one["pool"] == two["pool"]
        assert one["order"] != two["order"]
    renamed = replace(made, rows=[{**own, "query_id": f"another {i}"} for i, own in enumerate(made.rows)])
    mining = renamed.mining(tmp_path / "renamed")
    for one, two in zip(first, found(mining, make_pools(mining)), strict=True):
        assert one["pool"] == two["pool"]
        assert one["order"] != two["order"]


def test_finished_pools_serve_again_and_others_have_a_folder_of_their_own(tmp_path: Path, here: list[str]) -> None:
    made = replace(world(), settings=SETTINGS["plain"])
    mining = made.mining(tmp_path)
    folder = make_pools(mining)
    here.clear()
    same: list[dict[str, Any]] = [{"negative_number": 3}, {"max_uses": 2}, {"fill_up": False}, {"denoise": True}]
    assert {make_pools(replace(mining, config=replace(mining.config, **change))) for change in same} == {folder}
    assert not here
    others: list[dict[str, Any]] = [
        {"min_score": 0.0},
        {"margin_positive": "highest"},
        {"near_duplicate": 0.3},
        {"sampling_strategy": "top"},
    ]
    others += [{"max_score": 0.1}, {"absolute_margin": 0.1}, {"relative_margin": 0.1}]
    folders = {make_pools(replace(mining, config=replace(mining.config, **change))) for change in others}
    assert len({*folders, folder}) == len(others) + 1


def test_positives_that_cannot_be_encoded_have_no_score_and_no_margin(tmp_path: Path) -> None:
    """With given embeddings of the corpus there is no model for them."""
    made = replace(world(), settings=SETTINGS["lowest"])
    mining = made.mining(tmp_path)
    rows = found(replace(mining, absent=None), make_pools(replace(mining, absent=None)))
    assert rows[2]["positives"] == [None]
    assert math.isnan(rows[2]["positive"])
    assert rows[2]["dropped"]["absolute_margin"] == 0
    assert rows[3]["positives"] == [None, product(made.rows[3]["query"], CORPUS["p13"]), None]
    known = product(made.rows[3]["query"], CORPUS["p13"]) - 0.125
    assert max(score for *_, score in rows[3]["pool"]) <= known


def test_scores_of_positives_stand_where_the_positives_stand(tmp_path: Path) -> None:
    """Also of one text under several ids, and of one id that is there twice; by id where the corpus has it."""
    passages = [{"id": "in", "text": "first"}, {"id": "other", "text": "fourth"}]
    corpus = with_vectors(stored(tmp_path / "corpus", PASSAGES, passages, 10), "text")
    by_text = tmp_path / "by_text.npz"
    np.savez(by_text, hashes=hash_texts(["fourth"]), rows=np.array([1]))
    absent = [{"id": passage_key(text), "text": text} for text in ("second", "third")]
    elsewhere = with_vectors(stored(tmp_path / "absent", PASSAGES, absent, 10), "text")
    scores = PositiveScores(corpus, [str(elsewhere.folder), str(elsewhere.store.folder)], by_text)
    rows = [
        {"pos": ["second", "a text that is not read", "second", "third"], "pos_ids": ["x", "in", "y", "z"]},
        {"pos": ["nowhere"], "pos_ids": ["nobody"]},
        {"pos": ["third", "third"], "pos_ids": ["in", "z"]},
        {"pos": ["fourth", "nowhere"], "pos_ids": ["under another id", "w"]},
    ]
    queries = np.stack([vector(f"query {i}") for i in range(4)])
    of = scores.of(queries, rows)
    assert of[0] == [product("query 0", text) for text in ("second", "first", "second", "third")]
    assert len(of[1]) == 1
    assert math.isnan(of[1][0])
    assert of[2] == [product("query 2", "first"), product("query 2", "third")]
    assert of[3][0] == product("query 3", "fourth")
    assert math.isnan(of[3][1])
    everyones = [{"pos": row["pos"], "pos_ids": [*row["pos_ids"], "more"]} for row in rows]  # lists of two lengths
    known = [{score for score in own if not math.isnan(score)} for own in scores.of_all(queries, everyones)]
    assert known[0] == {product("query 0", text) for text in ("first", "second", "third")}
    assert known[1] == set()
    config = MineConfig()
    assert measured_from(scores.of_all(queries, everyones)[1], config) is None
    assert measured_from([math.nan, 2.0, -1.0], config) == -1
    assert measured_from([math.nan, 2.0, -1.0], replace(config, margin_positive="highest")) == 2


def test_absent_positives_are_each_there_once(tmp_path: Path) -> None:
    made = replace(world(), cut=(2, 1000))
    mining = made.mining(tmp_path)
    assert isinstance(mining.absent, Vectors)
    rows = [row for table in mining.absent.store.iter_parts() for row in table.to_pylist()]
    assert [row["text"] for row in rows] == [ELSEWHERE[0], ELSEWHERE[1], ELSEWHERE[2], NEAR]
    assert len({row["id"] for row in rows}) == 4
    first = next(iter(mining.corpus.iter_parts())).to_pylist()[3]
    under_another_id = row(90, "asked", {"another id": first["text"], "a third": "nowhere"})
    other = stored(tmp_path / "other", mining.rows.schema, [under_another_id], 10)
    store = absent_positives(mining.experiment, other, mining.corpus)
    assert store is not None
    assert [one["text"] for one in store.read_part(0).to_pylist()] == ["nowhere"], "one is there by its text"
    with np.load(known_by_text(mining.experiment, other, mining.corpus)) as known:
        assert (known["hashes"].tolist(), known["rows"].tolist()) == (hash_texts([first["text"]]).tolist(), [3])
    inside = stored(tmp_path / "inside", mining.rows.schema, made.rows[:2], 10)
    assert absent_positives(mining.experiment, inside, mining.corpus) is None
