"""Every different pair is scored once, over parts and calls, and killed calls go on to the same bits.

Most tests do the units here, one after the other, with a teacher whose scores tell how pairs were batched.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayembed.config import Experiment
from rayembed.jobs import pairs as jobs_pairs
from rayembed.jobs.pair_scores import RUNS
from rayembed.jobs.pairs import PairCounts, PairSource, counted_scores, score_pairs, teacher_reads
from rayembed.jobs.units import Unit, UnitError, Work
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_pairs import BatchTeacher, FilePairs, Pairs, random_parts, write_source

PARTS = random_parts(0, parts=5, pairs=40)
DIFFERENT = {pair for part in PARTS for pair in part}


@dataclass
class Inline:
    """Does units in this process, as `run_units` does, and stops before the unit of `stop_before`."""

    teacher: BatchTeacher = field(default_factory=BatchTeacher)
    stop_before: int | None = None
    done: int = 0

    def run_units(self, units: Sequence[Unit], work: Work, config: object, **_: object) -> list[dict[str, Any]]:
        worker = getattr(jobs_pairs, work.worker.removeprefix("rayembed.jobs.pairs:"))(
            **work.arguments, threads=1, use_gpu=False
        )
        counts = []
        for unit in units:
            mark = work.folder / "done" / f"{unit.name}.json"
            if not mark.exists():
                if self.done == self.stop_before:
                    raise UnitError("killed")
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.write_text(json.dumps(worker(unit.spec, unit.name, work.folder)))
                self.done += 1
            counts.append(json.loads(mark.read_text()))
        return counts


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Inline:
    inline = Inline()
    monkeypatch.setattr(jobs_pairs, "run_units", inline.run_units)
    monkeypatch.setattr(jobs_pairs, "load_reranker", lambda *_, **__: inline.teacher)
    monkeypatch.setattr(jobs_pairs, "PAIRS_PER_UNIT", 7)
    return inline


@pytest.fixture
def experiment(make_experiment: MakeExperiment, tiny_reranker: Path, tmp_path: Path) -> Experiment:
    return make_experiment(tmp_path / "run", score={"model": str(tiny_reranker), "max_len": 64})


@pytest.fixture
def source(tmp_path: Path) -> PairSource:
    return write_source(tmp_path / "pairs.json", PARTS)


def published(experiment: Experiment) -> dict[str, bytes]:
    """Every file of the published runs; nothing else is left beside them."""
    (cache,) = Path(experiment.cache()).glob("pairs-*")
    assert list((cache / "calls").iterdir()) == []
    assert {path.name for path in cache.iterdir()} == {"calls", RUNS}
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*.npy")}


def elsewhere(experiment: Experiment, folder: Path, **changes: Any) -> Experiment:  # noqa: ANN401
    """The same with a cache of its own."""
    return replace(experiment, cache_dir=str(folder), **changes)


def test_every_different_pair_is_scored_once(experiment: Experiment, source: PairSource, inline: Inline) -> None:
    scores, counts = counted_scores(experiment, source, what="score")
    calls = [pair for call in inline.teacher.calls for pair in call]
    assert len(calls) == len(DIFFERENT) < 200
    assert set(calls) == DIFFERENT
    assert counts == PairCounts(pairs=200, different=len(DIFFERENT), scored=len(DIFFERENT))
    for part in PARTS:
        expected = [len(query) * 100 + len(passage) for query, passage in part]
        np.testing.assert_allclose(scores.lookup(part), expected, atol=0.01)
    assert max(map(len, inline.teacher.calls)) == 7
    of_part = [pair for call in inline.teacher.calls[:4] for pair in call]
    lengths = [len(query) + len(passage) for query, passage in of_part]
    assert lengths == sorted(lengths, reverse=True), "the units of the first part hold texts of like length"


def test_a_second_call_scores_what_is_new(
    experiment: Experiment, source: PairSource, inline: Inline, tmp_path: Path
) -> None:
    first = score_pairs(experiment, source, what="score")
    before, inline.done = first.lookup(PARTS[0]), 0
    assert counted_scores(experiment, source, what="score")[1] == PairCounts(200, len(DIFFERENT), 0)
    assert inline.done == 0
    more: list[Pairs] = [[("new query", "b"), PARTS[0][0]], [("new query", "b"), ("new query", "a")]]
    again, counts = counted_scores(experiment, write_source(tmp_path / "more.json", more), what="score")
    assert counts == PairCounts(pairs=4, different=3, scored=2)
    assert inline.teacher.calls[-2:] == [[("new query", "b")], [("new query", "a")]]
    np.testing.assert_array_equal(again.lookup(PARTS[0]), before)
    assert not np.isnan(again.lookup(more[1])).any()


def test_no_pair_is_lost_when_halves_of_keys_are_equal(
    experiment: Experiment, source: PairSource, inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = jobs_pairs.pair_keys

    def weak(pairs: Pairs) -> Any:  # noqa: ANN401
        keys = own(pairs)
        keys[0] %= np.uint64(3)
        return keys

    monkeypatch.setattr(jobs_pairs, "pair_keys", weak)
    monkeypatch.setattr("rayembed.jobs.pair_scores.pair_keys", weak)
    scores, counts = counted_scores(experiment, source, what="score")
    assert counts.scored == len(DIFFERENT)
    expected = [len(query) * 100 + len(passage) for query, passage in PARTS[4]]
    np.testing.assert_allclose(scores.lookup(PARTS[4]), expected, atol=0.01)


@pytest.mark.parametrize("units", [0, 1, 5])
def test_a_call_that_is_killed_goes_on_to_the_same_bits(
    experiment: Experiment, source: PairSource, inline: Inline, tmp_path: Path, units: int
) -> None:
    straight, broken = (elsewhere(experiment, tmp_path / name) for name in ("straight", "broken"))
    score_pairs(straight, source, what="score")
    inline.done, inline.stop_before = 0, units
    with pytest.raises(UnitError):
        score_pairs(broken, source, what="score")
    assert inline.done == units
    inline.stop_before, inline.teacher.calls = None, []
    _, counts = counted_scores(broken, source, what="score")
    assert counts.scored == len(DIFFERENT), "counted as in a call that was not killed"
    assert sum(map(len, inline.teacher.calls)) == len(DIFFERENT) - 7 * units
    assert published(broken) == published(straight)


def test_a_unit_that_was_written_but_not_marked_is_not_scored_again(
    experiment: Experiment, source: PairSource, inline: Inline
) -> None:
    inline.stop_before = 2
    with pytest.raises(UnitError):
        score_pairs(experiment, source, what="score")
    for mark in Path(experiment.cache()).rglob("done/*.json"):
        mark.unlink()
    inline.stop_before, inline.teacher.calls = None, []
    score_pairs(experiment, source, what="score")
    assert sum(map(len, inline.teacher.calls)) == len(DIFFERENT) - 14


def test_planning_that_is_killed_goes_on_with_the_parts_that_are_left(
    experiment: Experiment, source: PairSource, inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = (elsewhere(experiment, tmp_path / name) for name in ("straight", "broken"))
    score_pairs(straight, source, what="score")
    own, asked = FilePairs.pairs, list[int]()

    def until(part: int, stop: int) -> None:
        asked.append(part)
        if part == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(FilePairs, "pairs", lambda self, part: until(part, 3) or own(self, part))
    with pytest.raises(KeyboardInterrupt):
        score_pairs(broken, source, what="score")
    asked.clear()
    inline.stop_before, inline.done = 0, 0
    monkeypatch.setattr(FilePairs, "pairs", lambda self, part: until(part, -1) or own(self, part))
    with pytest.raises(UnitError):
        score_pairs(broken, source, what="score")
    assert asked == [3, 4]
    inline.stop_before = None
    score_pairs(broken, source, what="score")
    assert published(broken) == published(straight)


def test_a_source_that_changed_since_the_plan_is_planned_again(
    experiment: Experiment, source: PairSource, inline: Inline, tmp_path: Path
) -> None:
    inline.stop_before = 2
    with pytest.raises(UnitError):
        score_pairs(experiment, source, what="score")
    inline.stop_before = None
    changed = [PARTS[0], [("x", "y"), *PARTS[1]], *PARTS[2:4], [("x", "z")]]
    write_source(tmp_path / "pairs.json", changed)
    scores = score_pairs(experiment, source, what="score")
    assert not np.isnan(np.concatenate([scores.lookup(part) for part in changed])).any()
    assert np.isnan(scores.lookup([pair for pair in PARTS[4] if pair not in {p for c in changed for p in c}])).all()
    calls = [pair for call in inline.teacher.calls for pair in call]
    assert len(calls) == len(set(calls))


def test_a_source_that_is_never_the_same_is_refused(
    experiment: Experiment, source: PairSource, inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, reads = FilePairs.pairs, iter(range(1000))
    monkeypatch.setattr(FilePairs, "pairs", lambda self, part: [*own(self, part), ("q", f"read {next(reads)}")])
    with pytest.raises(ValueError, match=r"tests\.jobs\.toy_pairs:FilePairs gives other pairs when it is read again"):
        score_pairs(experiment, source, what="score")


def test_a_score_that_is_no_number_is_refused(
    experiment: Experiment, source: PairSource, inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = np.array([1, np.nan, 2, np.inf, 0, 0, 0], np.float32)
    monkeypatch.setattr(inline.teacher, "score", lambda pairs, **_: bad[: len(pairs)])
    with pytest.raises(ValueError, match=r"score of 2 of 7 pairs is not a number, among them query '.*'; set encode"):
        score_pairs(experiment, source, what="score")


def test_other_settings_of_the_teacher_have_other_scores(experiment: Experiment, tiny_model: Path) -> None:
    assert experiment.score is not None
    changes: list[dict[str, Any]] = [
        {},
        {"max_len": 32},
        {"query_instruction_for_rerank": "A: "},
        {"passage_instruction_for_rerank": "A: "},
        {"kind": "decoder-reranker"},
        {"kind": "decoder-reranker", "prompt": "Is it?"},
        {"model": str(tiny_model)},
        {"model": str(tiny_model), "pooling": "mean"},
        {"model": str(tiny_model), "query_instruction_for_retrieval": "A: "},
        {"model": str(tiny_model), "passage_instruction_for_retrieval": "A: "},
    ]
    found = [teacher_reads(replace(experiment, score=replace(experiment.score, **change))) for change in changes]
    on_gpu = replace(experiment, ray=replace(experiment.ray, use_gpu=True))
    tokens = [replace(config.encode, tokens_per_batch=number) for config, number in ((experiment, 100), (on_gpu, 4096))]
    others = [
        replace(experiment, encode=replace(experiment.encode, dtype="bfloat16")),
        replace(experiment, encode=tokens[0]),
        on_gpu,
        replace(on_gpu, encode=tokens[1]),
    ]
    found += map(teacher_reads, others)
    assert len({json.dumps(reads, sort_keys=True) for reads in found}) == len(changes) + len(others)
    assert teacher_reads(replace(experiment, encode=tokens[1])) == found[0], "what null stands for on a CPU"
    assert (
        teacher_reads(replace(experiment, score=replace(experiment.score, query_instruction_for_rerank=""))) == found[0]
    )


def test_a_teacher_without_positions_for_max_len_is_refused_at_once(
    experiment: Experiment, source: PairSource, inline: Inline
) -> None:
    assert experiment.score is not None
    with pytest.raises(ValueError, match=r"score\.max_len is 200, but .* at most 128 tokens"):
        score_pairs(replace(experiment, score=replace(experiment.score, max_len=200)), source, what="score")
    assert not Path(experiment.cache()).exists()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_workers_that_are_killed_leave_the_same_bits(
    experiment: Experiment, source: PairSource, tmp_path: Path
) -> None:
    ray = replace(experiment.ray, max_unit_retries=0)
    straight, broken = (elsewhere(experiment, tmp_path / name, ray=ray) for name in ("straight", "broken"))
    deadly = tmp_path / "pairs.deadly"
    deadly.write_text("2")
    with pytest.raises(
        UnitError, match=r"part-00002-00000000 \(pairs 0 to \d+ of part 2, by length\): killed its worker"
    ):
        score_pairs(broken, source, what="score")
    deadly.unlink()
    score_pairs(replace(broken, ray=replace(ray, num_workers=2)), source, what="score")
    score_pairs(straight, source, what="score")
    assert published(broken) == published(straight)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_an_embedder_reads_every_text_once(
    make_experiment: MakeExperiment, source: PairSource, tiny_model: Path, tmp_path: Path
) -> None:
    experiment = make_experiment(
        tmp_path / "run",
        score={
            "model": str(tiny_model),
            "pooling": "mean",
            "max_len": 64,
            "query_instruction_for_retrieval": "didi ",
            "passage_instruction_for_retrieval": "kuku ",
        },
        mine={"rounds": 2},
        train={},
    )
    scores = score_pairs(experiment, source, what="score")
    texts = [sorted({pair[side] for pair in DIFFERENT}) for side in (0, 1)]
    queries = dict(zip(texts[0], vectors(tiny_model, [f"didi {text}" for text in texts[0]], 24), strict=True))
    passages = dict(zip(texts[1], vectors(tiny_model, [f"kuku {text}" for text in texts[1]], 64), strict=True))
    for part in PARTS:
        expected = [float(queries[query] @ passages[passage]) for query, passage in part]
        np.testing.assert_allclose(scores.lookup(part), expected, atol=1e-5)
    encoded = sorted(
        sum(len(np.load(file)) for file in folder.glob("part-*.npy"))
        for folder in Path(experiment.cache()).glob("vectors-*")
    )
    assert encoded == sorted(map(len, texts))
