"""The job mine under other settings, from the data to its files, mostly without Ray."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from rayembed.config import Experiment
from rayembed.config.score import ScoreConfig
from rayembed.jobs import mine, score
from rayembed.models.rerankers import load_reranker
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import rankings
from tests.jobs.test_mine import allowed
from tests.jobs.toy_data import NUM_PASSAGES, NUM_TRAIN, read_lines, read_texts
from tests.jobs.without_ray import do_units_here

FIRST, LAST, NUMBER = 0, 20, 6
MARGIN = 0.002  # between the tiny reranker's scores
MINE = {"range_for_sampling": f"{FIRST}-{LAST}", "negative_number": NUMBER}
Make = Callable[..., Experiment]


@pytest.fixture
def here() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        yield do_units_here(patch)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs: what settings do not change is served, and what they change must not be."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(make_experiment: MakeExperiment, cache: Path, tmp_path: Path) -> Make:
    """An experiment in a run folder by its name."""

    def made(name: str, *, shared: bool = True, **sections: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
        mine_section = {**MINE, **sections.pop("mine", {})}
        experiment = make_experiment(tmp_path / name, mine=mine_section, **sections)
        return type(experiment)(**{**vars(experiment), "cache_dir": str(cache)}) if shared else experiment

    return made


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny model, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    model = BertModel.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranked(beir: Path, tiny_model: Path) -> dict[str, list[str]]:
    return rankings(tiny_model, read_texts(beir / "queries.jsonl"), read_texts(beir / "corpus.jsonl"), (24, 48))


@pytest.fixture(scope="module")
def reranker(tiny_reranker: Path) -> Callable[[str, list[str]], list[float]]:
    """Scores of a query and texts by the teacher itself."""
    teacher = load_reranker(ScoreConfig(model=str(tiny_reranker), max_len=64), "reranker", device=torch.device("cpu"))

    def scores(query: str, texts: list[str]) -> list[float]:
        pairs = [(query, text) for text in texts]
        found: list[float] = teacher.score(pairs, tokens_per_batch=4096, dtype=torch.float32).tolist()
        return found

    return scores


def lines(folder: Path) -> bytes:
    """The rows in their order, however they are cut into files."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl")))


def stats(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stats.json").read_text())
    return found


def test_the_teacher_denoises_and_the_job_score_takes_its_scores(
    here: list[str],
    make: Make,
    beir: Path,
    tiny_reranker: Path,
    ranked: dict[str, list[str]],
    reranker: Callable[[str, list[str]], list[float]],
) -> None:
    experiment = make(
        "run", mine={"denoise": True, "denoise_margin": MARGIN}, score={"model": str(tiny_reranker), "max_len": 64}
    )
    folder, passages = mine.run(experiment), read_texts(beir / "corpus.jsonl")
    rows, figures, filled, denoised = read_lines(folder), stats(folder), 0, 0
    for row in rows:
        inside, _ = allowed(row, ranked[row["query_id"]][FIRST:LAST], passages)
        bound = min(reranker(row["query"], row["pos"])) - MARGIN
        judged = dict(zip(inside, reranker(row["query"], [passages[name] for name in inside]), strict=True))
        assert min((abs(value - bound) for value in judged.values()), default=1) > 1e-5, "none too near to tell"
        good = [name for name in inside if judged[name] <= bound]
        denoised += len(inside) - len(good)
        chosen = [name for name in row["neg_ids"] if name in ranked[row["query_id"]][:LAST]]
        assert {*chosen} <= {*good}
        assert len(chosen) == min(NUMBER, len(good))
        filled += NUMBER - len(chosen)
    assert 100 < denoised < NUM_TRAIN * LAST * 0.8, "the data must show what is tested"
    assert filled > 10, "the data must show what is tested"
    assert figures["dropped"]["denoised"] == denoised
    assert figures["filled_up"] == filled
    assert figures["judged_pairs"] == NUM_TRAIN * NUMBER - filled
    assert figures["suspected_by_teacher"] == 0
    assert figures["teacher"] == str(tiny_reranker)
    scored = score.run(experiment)
    assert stats(scored)["different_pairs"] - stats(scored)["taken_from_cache"] == filled
    for row in read_lines(scored):
        assert row["pos_scores"] == pytest.approx(reranker(row["query"], row["pos"]), abs=1e-5)
        assert row["neg_scores"] == pytest.approx(reranker(row["query"], row["neg"]), abs=1e-5)


def test_the_first_of_the_draw_alone_are_judged(
    here: list[str],
    make: Make,
    beir: Path,
    tiny_reranker: Path,
    reranker: Callable[[str, list[str]], list[float]],
) -> None:
    middle = float(np.median(reranker("baba", list(read_texts(beir / "corpus.jsonl").values()))))
    settings = {"denoise": True, "denoise_margin": None, "denoise_max_score": middle, "denoise_candidates": 5}
    teacher = {"model": str(tiny_reranker), "max_len": 64}
    folder = mine.run(make("run", mine={**settings, "fill_up": False}, score=teacher))
    figures = stats(folder)
    judged = NUM_TRAIN * 5
    candidates = NUM_TRAIN * LAST - sum(
        count for name, count in figures["dropped"].items() if name not in ("denoised", "not_judged")
    )
    assert figures["dropped"]["not_judged"] == candidates - judged
    assert 0 < figures["negatives"] == judged - figures["dropped"]["denoised"]
    assert figures["short_by"] == NUM_TRAIN * NUMBER - figures["negatives"] > 0
    assert figures["queries_short"] == sum(len(row["neg"]) < NUMBER for row in read_lines(folder))


def test_without_denoising_the_teacher_judges_a_sample(
    here: list[str],
    make: Make,
    tiny_reranker: Path,
    reranker: Callable[[str, list[str]], list[float]],
) -> None:
    teacher = {"model": str(tiny_reranker), "max_len": 60}  # a cache of scores that no other test has filled
    results = {
        number: mine.run(make(str(number), mine={"audit_queries": number}, score=teacher)) for number in (0, 10, 1000)
    }
    plain = mine.run(make("plain"))
    assert {lines(folder) for folder in results.values()} == {lines(plain)}, "the rows are the same"
    figures = {number: stats(folder) for number, folder in results.items()}
    assert [figures[number]["judged_queries"] for number in results] == [0, 10, NUM_TRAIN]
    assert [figures[number]["judged_pairs"] for number in results] == [0, 10 * NUMBER, NUM_TRAIN * NUMBER]
    suspected = 0
    for row in read_lines(plain):
        lowest = min(reranker(row["query"], row["pos"]))
        margins = [lowest - value for value in reranker(row["query"], row["neg"])]
        assert min(map(abs, margins)) > 1e-6, "none too near to tell"
        suspected += sum(margin < 0 for margin in margins)
    assert figures[1000]["suspected_by_teacher"] == suspected > 0
    assert 0 < figures[10]["suspected_by_teacher"] < suspected
    assert (stats(plain)["judged_pairs"], stats(plain)["teacher"]) == (0, None)
    page = (results[10] / "audit.html").read_text()
    assert f"of {10 * NUMBER} pairs" in page
    assert "The teacher judged no pair." in (plain / "audit.html").read_text()


def test_given_embeddings_give_what_encoding_gives(here: list[str], make: Make, tmp_path: Path) -> None:
    settings = {"relative_margin": 0.01}
    encoded = make("encoded", shared=False, mine=settings)
    expected = mine.run(encoded)
    for folder in (tmp_path / "encoded" / "cache").glob("vectors-*"):
        side = json.loads((folder / "depends_on.json").read_text())["side"]
        vectors = np.concatenate([np.load(path) for path in sorted(folder.glob("part-*.npy"))])
        np.save(tmp_path / f"{side}.npy", vectors)
    paths = {
        f"{of}_embeddings": [str(tmp_path / f"{side}.npy")] for of, side in (("corpus", "passage"), ("query", "query"))
    }
    here.clear()
    found = mine.run(make("given", shared=False, mine={**settings, **paths}))
    assert lines(found) == lines(expected)
    assert not [name for name in here if name.startswith("encode")]
    assert [name for name in here if name.startswith("read embeddings")]
    assert stats(found) == stats(expected)
    one = mine.run(make("one", shared=False, mine={**settings, "query_embeddings": paths["query_embeddings"]}))
    assert lines(one) == lines(expected), "one side given, the other encoded"
    shifted = np.roll(np.load(tmp_path / "query.npy"), 1, axis=0)
    np.save(tmp_path / "shifted.npy", shifted)
    other = mine.run(make("other", shared=False, mine={**paths, "query_embeddings": [str(tmp_path / "shifted.npy")]}))
    assert lines(other) != lines(expected), "they are used"


@pytest.mark.parametrize("margin", ["absolute_margin", "relative_margin"])
def test_margins_to_positives_that_no_model_encodes_are_refused(
    margin: str, here: list[str], make: Make, beir: Path, tmp_path: Path
) -> None:
    rows = read_lines(beir / "corpus.jsonl")
    corpus = [row for i, row in enumerate(rows) if i % 100 >= 5]  # neither these five nor the copies of their texts
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    np.save(tmp_path / "corpus.npy", np.ones((NUM_PASSAGES - 10, 64), np.float32))
    data = {"corpus": [str(tmp_path / "corpus.jsonl")]}
    given = {"corpus_embeddings": [str(tmp_path / "corpus.npy")]}
    bad = make("run", data=data, mine={**given, margin: 0.1})
    for job in (mine.run, mine.plan):
        with pytest.raises(ValueError, match=rf"mine\.{margin} needs the scores of all positives, but 5 of them"):
            job(bad)
    assert not here, "before anything starts"
    assert "mine:" in mine.plan(make("without", data=data, mine=given)), "without a margin they need no score"
    assert "mine:" in mine.plan(make("encoded", data=data, mine={margin: 0.1}))


def test_positives_outside_the_corpus_are_encoded_for_margins(
    here: list[str], make: Make, beir: Path, tmp_path: Path
) -> None:
    absent = {"p013", "p010", "p020"}
    corpus = [row for row in read_lines(beir / "corpus.jsonl") if row["_id"] not in absent]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    settings = {"absolute_margin": 0.02, "range_for_sampling": "0-120", "negative_number": 120, "fill_up": False}
    found = mine.run(make("less", data={"corpus": [str(tmp_path / "corpus.jsonl")]}, mine=settings))
    whole = mine.run(make("whole", mine=settings))
    assert stats(found)["positives_without_score"] == 0
    for less, more in zip(read_lines(found), read_lines(whole), strict=True):
        assert less["neg_ids"] == [name for name in more["neg_ids"] if name not in absent], "by the same margins"
        if {*more["pos_ids"]} <= absent:
            assert len(more["neg_ids"]) < 100, "the data must show what is tested"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_do_not_depend_on_units_their_order_and_the_exact_backend(
    dtype: str, here: list[str], make: Make, tiny_reranker: Path
) -> None:
    """Also with a limit that later rows feel, and a teacher; two workers of Ray are in test_mine.py."""
    settings = {"max_uses": 5, "denoise": True, "denoise_max_score": 1.0, "absolute_margin": 0.0}
    teacher = {"model": str(tiny_reranker), "max_len": 64}
    encode = {"dtype": dtype}
    expected = mine.run(make("first/run", shared=False, mine=settings, score=teacher, encode=encode))
    other = make(
        "second/run",
        shared=False,
        mine=settings,
        score=teacher,
        encode={**encode, "passages_per_unit": 29, "queries_per_unit": 23},
        search={"backend": "torch", "passages_per_index": 25, "passages_per_unit": 50, "queries_per_unit": 31},
    )
    with pytest.MonkeyPatch.context() as patch:
        do_units_here(patch, backwards=True)
        found = mine.run(other)
    assert len(list(found.glob("part-*.jsonl"))) == -(-NUM_TRAIN // 23)
    assert lines(found) == lines(expected)
    one, two = stats(expected), stats(found)
    assert one["dropped"]["max_uses"] > 0, "the data must show what is tested"
    assert one["dropped"]["denoised"] > 0, "the data must show what is tested"
    assert one.pop("search") == {"backend": "flat", "exact": True}
    assert two.pop("search") == {"backend": "torch", "exact": True}
    assert one == two
    pages = [(folder / "audit.html").read_text() for folder in (expected, found)]
    assert pages[0].replace("flat", "") == pages[1].replace("torch", "")


def test_grades_below_the_least_are_neither_positive_nor_negative(
    here: list[str], make: Make, beir: Path, tmp_path: Path
) -> None:
    graded = tmp_path / "graded"
    shutil.copytree(beir, graded)
    judged = [(i, i, 2) for i in range(NUM_TRAIN)] + [(i, (i + 40) % 100, 1) for i in range(0, NUM_TRAIN, 3)]
    text = [f"q{query:03d}\tp{passage:03d}\t{grade}" for query, passage, grade in judged]
    (graded / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *text]) + "\n")
    data = {"train": [str(graded)], "corpus": [str(graded)], "min_grade": 2}
    everything = {"range_for_sampling": "0-120", "negative_number": 120, "fill_up": False}
    found = mine.run(make("run", data=data, mine=everything))
    passages = read_texts(beir / "corpus.jsonl")
    for i, row in enumerate(read_lines(found)):
        assert row["pos_ids"] == [f"p{i:03d}"]
        related = {f"p{(i + 40) % 100:03d}"} if i % 3 == 0 else set()
        missing = {*passages} - {*row["neg_ids"]}
        copies = {name for name in missing if int(name[1:]) in (*range(10), *range(100, 110))}
        assert missing - copies - {"p110"} == {f"p{i:03d}", *related} - copies
        assert related <= missing
        assert {*(row.get("related_ids") or ())} == related
    assert stats(found)["dropped"]["related_id"] == 27
    filled_up = mine.run(make("filled", data=data, mine={"range_for_sampling": "0-1", "negative_number": 60}))
    assert stats(filled_up)["filled_up"] > 40 * NUM_TRAIN
    for row in read_lines(filled_up):
        assert not {*(row.get("related_ids") or ())} & {*row["neg_ids"]}, "nor do they fill up"


def test_another_model_mines_with_its_own_pooling_and_instructions(
    here: list[str], make: Make, beir: Path, other_model: Path
) -> None:
    own = {
        "model": str(other_model),
        "pooling": "mean",
        "query_instruction_for_retrieval": "look for ",
        "passage_instruction_for_retrieval": "this is ",
    }
    trained = {"pooling": "cls", "query_instruction_for_retrieval": "ask: ", "passage_instruction_for_retrieval": "a: "}
    found = mine.run(make("run", model=trained, mine={**own, "sampling_strategy": "top", "fill_up": False}))
    passages, queries = read_texts(beir / "corpus.jsonl"), read_texts(beir / "queries.jsonl")
    asked, answers = (
        {name: words + text for name, text in texts.items()}
        for words, texts in (("look for ", queries), ("this is ", passages))
    )
    ranked = rankings(other_model, asked, answers, (24, 48))
    for row in read_lines(found):
        inside, _ = allowed(row, ranked[row["query_id"]][FIRST:LAST], passages)
        assert row["neg_ids"] == inside[:NUMBER]


@pytest.mark.parametrize("backend", ["ivf", "hnsw"])
def test_approximate_searches_say_what_they_found(
    backend: str, here: list[str], make: Make, ranked: dict[str, list[str]]
) -> None:
    low = {"ivf": {"ivf_lists": 12, "ivf_probes": 1}, "hnsw": {"hnsw_neighbors": 2, "hnsw_ef_search": 1}}[backend]
    search = {"backend": backend, "recall_queries": 1000, **low}
    settings = {"range_for_sampling": "0-4", "sampling_strategy": "top", "fill_up": False}
    found = mine.run(make("run", search=search, mine=settings))
    told = stats(found)["search"]
    assert (told["backend"], told["recall_at"], told["queries"]) == (backend, 4, NUM_TRAIN)
    assert 0.2 < told["recall"] < 1
    rows, exact = read_lines(found), read_lines(mine.run(make("exact", mine=settings)))
    assert [row["neg_ids"] for row in rows] != [row["neg_ids"] for row in exact]
    for row in rows:
        places = [ranked[row["query_id"]].index(name) for name in row["neg_ids"]]
        assert all(one < other for one, other in pairwise(places)), "what is found is scored exactly"
