"""A teacher's scores of (query, passage) pairs, each different pair once: over all parts of a source, calls and jobs.

A call plans which pairs are to be scored (not in the cache, not met in an earlier part), scores them in units, and
publishes them as one run of the cache. The last bits of a score depend on the batch that it was computed in; the plan
lies on disk and fixes the batches, so a call that was killed goes on to the same scores.
"""

import hashlib
import importlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.wording import counted
from rayembed.data import mirror
from rayembed.data.storage import fingerprint, whole_folder, working_folder, write_atomic
from rayembed.data.store import PASSAGES, QUERIES, Store, StoreWriter
from rayembed.jobs.pair_scores import Keys, Pairs, PairScores, SeenKeys, pair_keys, publish, write_run
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.teacher import (
    check_teacher,
    embedding_teacher,
    kind_of_teacher,
    passage_length,
    teacher_reads,
    teacher_section,
    teacher_wording,
    worded_reading,
)
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vector_files import Vectors
from rayembed.jobs.vectors import Wanted, encode_stores
from rayembed.models.encoding import resolve_dtype, resolve_tokens_per_batch
from rayembed.models.pairs import PairReading
from rayembed.models.rerankers import load_reranker, teacher_reading
from rayembed.tracking.progress import Progress

__all__ = ["PairCounts", "PairScores", "PairSource", "check_teacher", "counted_scores", "score_pairs", "teacher_reads"]
PAIRS_PER_UNIT = 8192  # what a worker tokenises at once, and what is lost when it dies


@dataclass(frozen=True)
class PairSource:
    """Where pairs come from; made again in each process that reads them."""

    maker: str
    """module:Class; Class(**arguments).pairs(part) gives the list of (query text, passage text), repeats allowed."""

    arguments: dict[str, Any]
    """As JSON."""

    parts: int

    sizes: tuple[int, ...]
    """Pairs of each part, at most, for the progress line."""

    worded: bool = False
    """The pairs are of RowTexts with the `teacher_wording` of the experiment, so nothing is put before them again."""


def sizes_of_parts(pairs: NDArray[np.int64], rows: int) -> tuple[int, ...]:
    """`PairSource.sizes` of a source whose parts have the pairs of so many rows each; `pairs`: of each row."""
    return tuple(int(pairs[start : start + rows].sum()) for start in range(0, len(pairs), rows))


class PairMaker(Protocol):
    """What `PairSource.maker` names."""

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """The pairs of a part; the same at every call."""


@dataclass(frozen=True)
class PairCounts:
    """What a call found."""

    pairs: int
    """With repeats."""

    different: int
    scored: int
    """Of the different ones; the others were in the cache."""


def score_pairs(
    experiment: Experiment, source: PairSource, *, what: str, reading: PairReading | None = None
) -> PairScores:
    """Scores the pairs that the cache lacks, by the teacher of section score, and returns the cache.

    Memory of the calling process: 16 bytes a different pair (32 while they are sorted anew), and the pairs of one part.

    Args:
        experiment: sections score, encode, ray.
        source: the pairs. Its fingerprint names what a killed call goes on with.
        what: first words of the progress lines.
        reading: how a reranker reads pairs. None: as section score and the model's rayembed.json say.

    Raises:
        ValueError: the teacher has no positions for score.max_len, or the source gives other pairs when read again.
        UnitError: some units failed; the others are kept.
    """
    return counted_scores(experiment, source, what=what, reading=reading)[0]


def counted_scores(
    experiment: Experiment, source: PairSource, *, what: str, reading: PairReading | None = None
) -> tuple[PairScores, PairCounts]:
    """As `score_pairs`, with what was found in the cache and what was not."""
    kind = kind_of_teacher(experiment)
    check_teacher(experiment, reading)
    cache = Path(experiment.cache()) / f"pairs-{fingerprint(teacher_reads(experiment, reading, worded=source.worded))}"
    if kind != "embedder" and reading is None:
        reading = teacher_reading(teacher_section(experiment))
        if source.worded and teacher_wording(experiment) is not None:
            reading = worded_reading(reading)
    call = cache / "calls" / fingerprint(asdict(source))
    counts = None
    while True:
        resumed = (call / "plan").exists() or working_folder(call / "plan").exists()
        plan = Plan.made(source, PairScores(cache), call / "plan", what)
        units = plan.units()
        pieces = _score(experiment, source, plan, units, kind, what, reading) if units else []
        if pieces:
            publish(pieces, cache, call.name)
        _remove(call)
        if counts is None or units:
            counts = plan.counts
        if not resumed and len(pieces) < len(units):
            raise ValueError(
                f"{source.maker} gives other pairs when it is read again: its files were changed meanwhile"
            )
        if not resumed:  # what an earlier call planned may be of what the source gave then: a new plan tells
            return PairScores(cache), counts


def _remove(folder: Path) -> None:
    """Removes a folder that nobody may find half removed."""
    leaving = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    mirror.remove(folder / "plan")  # first: without it nobody goes on with the rest
    mirror.remove(folder)
    shutil.rmtree(leaving)


@dataclass(frozen=True)
class Plan:
    """Which pairs of which part are to be scored, in the order in which they are: the longest texts first."""

    folder: Path
    counts: PairCounts
    scored: tuple[int, ...]
    """Pairs of each part that are to be scored."""

    @classmethod
    def made(cls, source: PairSource, scores: PairScores, folder: Path, what: str) -> "Plan":
        """The plan in the folder; where there is none or a part of one, what is missing is made."""
        if not folder.exists():
            mirror.folder_here(working_folder(folder))
            with whole_folder(folder) as working:
                parts = list(_planned_parts(source, scores, working, what))
                total = [sum(getattr(count, key) for count in parts) for key in ("pairs", "different", "scored")]
                value = {"counts": total, "scored": [count.scored for count in parts]}
                write_atomic(working / "plan.json", json.dumps(value).encode())
        value = json.loads(mirror.here(folder / "plan.json").read_text())
        return cls(folder, PairCounts(*value["counts"]), tuple(value["scored"]))

    def units(self) -> list[Unit]:
        """Units of at most PAIRS_PER_UNIT pairs, each of one part."""
        return [
            Unit(
                f"part-{part:05d}-{first:08d}",
                last - first,
                {"part": part, "first": first, "last": last},
                f"pairs {first} to {last - 1} of part {part}, by length",
            )
            for part, scored in enumerate(self.scored)
            for first in range(0, scored, PAIRS_PER_UNIT)
            for last in (min(first + PAIRS_PER_UNIT, scored),)
        ]


def _planned_parts(source: PairSource, scores: PairScores, folder: Path, what: str) -> Iterator[PairCounts]:
    """Writes what is to be scored of each part, and what tells whether the part is still the same."""
    seen, progress = SeenKeys(), Progress(f"{what}: look up", sum(source.sizes), unit="pairs")
    maker = _maker(source)
    for part in range(source.parts):
        file = folder / f"part-{part:05d}.npz"
        if not file.exists():
            pairs = maker.pairs(part)
            keys = pair_keys(pairs)
            first = np.flatnonzero(~seen.add(keys))
            missing = np.isnan(scores.of_keys(keys[:, first]))
            index, known = first[missing], first[~missing]
            lengths = np.array([len(pairs[i][0]) + len(pairs[i][1]) for i in index], np.int64)
            index = index[np.argsort(-lengths, kind="stable")]
            buffer = io.BytesIO()
            met = {"new": keys[:, index], "known": keys[:, known]}
            np.savez(buffer, index=index, pairs=len(pairs), digest=_digest(keys), new=met["new"], known=met["known"])
            write_atomic(file, buffer.getvalue())
            written = _read(file)
        else:  # by a call that was killed
            written = _read(file)
            seen.add(written["new"])
            seen.add(written["known"])
        new, known = written["new"].shape[1], written["known"].shape[1]
        progress.add(source.sizes[part])
        yield PairCounts(int(written["pairs"]), new + known, new)


def _read(file: Path) -> dict[str, NDArray[Any]]:
    with np.load(mirror.here(file)) as arrays:
        return dict(arrays)


def _digest(keys: Keys) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.blake2b(keys.tobytes(), digest_size=16).digest(), np.uint8)


def _maker(source: PairSource) -> PairMaker:
    module, _, name = source.maker.partition(":")
    maker: PairMaker = getattr(importlib.import_module(module), name)(**source.arguments)
    return maker


class PlannedPairs:
    """The pairs of units, read from the source again."""

    def __init__(self, source: PairSource, plan: Path) -> None:
        self._maker, self._plan_folder, self._part = _maker(source), plan, -1
        self._pairs: list[tuple[str, str]] = []
        self._plan: dict[str, NDArray[Any]] = {}
        self._same = False

    def read(self, part: int, first: int, last: int) -> tuple[list[tuple[str, str]], Keys] | None:
        """Pairs and keys of a unit; None where the part is no longer what was planned."""
        if part != self._part:
            self._pairs, self._part = self._maker.pairs(part), part
            self._plan = _read(self._plan_folder / f"part-{part:05d}.npz")
            self._same = np.array_equal(_digest(pair_keys(self._pairs)), self._plan["digest"])
        if not self._same:
            return None
        return [self._pairs[i] for i in self._plan["index"][first:last]], self._plan["new"][:, first:last]


def _score(
    experiment: Experiment,
    source: PairSource,
    plan: Plan,
    units: list[Unit],
    kind: str,
    what: str,
    reading: PairReading | None,
) -> list[Path]:
    """Does the units; returns the runs that they wrote, none for a part that is no longer what was planned."""
    folder = plan.folder.with_name("units")
    arguments: dict[str, Any] = {"source": asdict(source), "plan": str(plan.folder)}
    if kind == "embedder":
        arguments |= _encoded(experiment, source, plan, units)
        worker = "rayembed.jobs.pairs:EmbedderWorker"
    else:
        assert reading is not None
        arguments |= {"experiment": shipped(experiment), "kind": kind, "reading": asdict(reading)}
        worker = "rayembed.jobs.pairs:RerankerWorker"
    work = Work(what=f"{what} by {kind}", counted="pairs", worker=worker, arguments=arguments, folder=folder)
    counts = run_units(units, work, experiment.ray, use_gpu=False if kind == "embedder" else None)
    return [folder / unit.name for unit, count in zip(units, counts, strict=True) if count["pairs"]]


class RerankerWorker:
    """Scores units of pairs by a cross-encoder or a decoder."""

    def __init__(
        self,
        *,
        experiment: str,
        kind: str,
        reading: dict[str, Any],
        source: dict[str, Any],
        plan: str,
        threads: int,
        use_gpu: bool,
    ) -> None:
        torch.set_num_threads(threads)
        self._experiment = received(experiment)
        self._planned = PlannedPairs(PairSource(**source), Path(plan))
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._teacher = load_reranker(
            teacher_section(self._experiment), kind, device=self._device, reading=PairReading(**reading)
        )

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one run."""
        planned = self._planned.read(**spec)
        if planned is None:
            return {"pairs": 0}
        pairs, keys = planned
        if not (folder / name).exists():  # else it was killed between this and its mark
            encode = self._experiment.encode
            scores = self._teacher.score(
                pairs,
                tokens_per_batch=resolve_tokens_per_batch(encode.tokens_per_batch, self._device),
                dtype=resolve_dtype(encode.dtype, self._device),
            )
            _write(folder / name, pairs, keys, scores)
        return {"pairs": len(pairs)}


class EmbedderWorker:
    """Scores units of pairs by the inner products of vectors that are there."""

    def __init__(
        self, *, source: dict[str, Any], plan: str, queries: list[str], passages: list[str], threads: int, use_gpu: bool
    ) -> None:
        self._planned = PlannedPairs(PairSource(**source), Path(plan))
        self._sides = [Vectors(Path(side[0]), Store.open(Path(side[1]))) for side in (queries, passages)]

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
        """Writes one run."""
        planned = self._planned.read(**spec)
        if planned is None:
            return {"pairs": 0}
        pairs, keys = planned
        if not (folder / name).exists():
            queries, passages = (
                vectors.take(vectors.store.find_ids(_text_ids(texts)))
                for vectors, texts in zip(self._sides, zip(*pairs, strict=True), strict=True)
            )
            _write(folder / name, pairs, keys, np.einsum("nd,nd->n", queries, passages))
        return {"pairs": len(pairs)}


def _write(folder: Path, pairs: Pairs, keys: Keys, scores: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(
            f"the teacher's score of {bad.size} of {counted(len(pairs), 'pair')} is not a number, among them query "
            f"{pairs[bad[0]][0][:80]!r}; set encode.dtype: float32, or score.model to another teacher"
        )
    write_run(folder, keys, scores)


def _encoded(experiment: Experiment, source: PairSource, plan: Plan, units: list[Unit]) -> dict[str, Any]:
    """Vectors of every query and passage text that the units need, each text once."""
    folder = plan.folder.with_name("texts")
    if not folder.exists():
        with whole_folder(folder, fresh=True) as working:
            _write_texts(working, PlannedPairs(source, plan.folder), units, experiment.passages_per_unit())
    queries, passages = (Store.open(folder / side) for side in ("queries", "passages"))
    worded = source.worded and teacher_wording(experiment) is not None
    teacher = embedding_teacher(experiment, worded=worded)
    wanted = [Wanted(queries, "query"), Wanted(passages, "passage", passage_length(experiment))]
    vectors = dict(zip(("queries", "passages"), encode_stores(teacher, wanted), strict=True))
    return {side: [str(own.folder), str(own.store.folder)] for side, own in vectors.items()}


def _write_texts(folder: Path, planned: PlannedPairs, units: list[Unit], rows_per_part: int) -> None:
    writers = [
        StoreWriter(folder / side, schema, rows_per_part)
        for side, schema in (("queries", QUERIES), ("passages", PASSAGES))
    ]
    seen = [SeenKeys(), SeenKeys()]
    for unit in units:
        found = planned.read(**unit.spec)
        sides = zip(*found[0], strict=True) if found else ((), ())
        for texts, met, writer in zip(sides, seen, writers, strict=True):
            different = list(dict.fromkeys(texts))
            known = met.add(_text_keys(different))
            for name, text, is_known in zip(_text_ids(different), different, known, strict=True):
                if not is_known:
                    writer.add({"id": name, "text": text})
    for writer in writers:
        writer.finish()


def _text_keys(texts: Sequence[str]) -> Keys:
    return pair_keys([(text, "") for text in texts])


def _text_ids(texts: Sequence[str]) -> list[str]:
    return [f"{upper:016x}{lower:016x}" for upper, lower in _text_keys(texts).T.tolist()]
