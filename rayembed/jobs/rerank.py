"""Rankings of a reranker: an embedder finds passages, the reranker scores the best of them and brings them in order."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.data.mirror import here
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import fingerprint, whole_file
from rayembed.data.store import Store
from rayembed.jobs.miner import with_embedder
from rayembed.jobs.pairs import PairSource, score_pairs, sizes_of_parts
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.teacher import check_teacher
from rayembed.models.loading import check_length, teacher_kind
from rayembed.models.pairs import trained_reading
from rayembed.models.probe import reranker_section
from rayembed.models.settings_file import embedder_config

QUERIES_PER_PART = 256  # of the pairs: not of the queries' store, whose cut must not decide which pairs share a batch
Candidates = list[NDArray[np.int64]]
"""Of each query, rows of the corpus."""


def retriever(experiment: Experiment) -> Experiment:
    """The experiment with the embedder that finds passages for a reranker in the place of the model."""
    name = experiment.evaluate.retriever if experiment.evaluate is not None else None
    if name is None:
        raise ValueError("a reranker orders what another model finds; set evaluate.retriever to an embedder")
    model = embedder_config(name, trust_remote_code=experiment.model.trust_remote_code)
    return replace(with_embedder(experiment, model), mine=None)


def check_retriever(experiment: Experiment) -> None:
    """Refuses a retriever that cannot find passages, by its configuration alone.

    Raises:
        ValueError: it is a reranker, or has no positions for the lengths of texts.
        FileNotFoundError: there is no checkpoint under its name.
    """
    found = retriever(experiment)
    name, remote = found.model.name_or_path, found.model.trust_remote_code
    if teacher_kind(name, trust_remote_code=remote) == "reranker":
        raise ValueError(
            f"evaluate.retriever {name} is a classifier of pairs by its config.json; set it to an embedder"
        )
    for side in ("query", "passage"):
        check_length(name, found.max_len(side), f"encode.{side}_max_len", trust_remote_code=remote)


def base_of(experiment: Experiment) -> str:
    """What a trained reranker is to be better than: the model where it is a reranker already, else the retriever."""
    base = experiment.model.name_or_path
    if "reranker" in teacher_kind(base, trust_remote_code=experiment.model.trust_remote_code):
        return base
    return (experiment.evaluate.retriever if experiment.evaluate is not None else None) or base


def check_rerankers(experiment: Experiment, models: Iterable[str]) -> None:
    """Refuses rerankers that cannot score, by their configurations alone; the retriever may be among the models.

    Raises:
        ValueError: one has more than one label, or no positions for the lengths of pairs.
        FileNotFoundError: there is no checkpoint under its name.
    """
    assert experiment.evaluate is not None
    for name in models:
        if name != experiment.evaluate.retriever:
            check_teacher(_asked(experiment, name), trained_reading(experiment))


def _asked(experiment: Experiment, model: str) -> Experiment:
    """The experiment with a reranker as its teacher."""
    return replace(
        experiment,
        score=reranker_section(experiment, model),
        output_dir=os.path.join(experiment.output_dir, "evaluate"),  # a teacher is not the model that is trained
        cache_dir=experiment.cache(),
        train=None,
        mine=None,
        evaluate=None,
    )


def pair_scores(
    experiment: Experiment, model: str, queries: Store, corpus: Store, candidates: Candidates
) -> list[NDArray[np.float32]]:
    """Scores of each query's candidates by a reranker, in their order; it reads them as in the experiment's training.

    Args:
        experiment: instructions, lengths, resources.
        model: name or folder of the reranker.
        queries: Q queries.
        corpus: the passages.
        candidates: of each query, rows of the corpus.
    """
    file = candidates_file(experiment, queries, corpus, candidates)
    arguments = {
        "experiment": shipped(replace(experiment, evaluate=None, train=None, mine=None)),
        "queries": str(queries.folder),
        "corpus": str(corpus.folder),
        "candidates": str(file),
    }
    lengths = np.array([len(own) for own in candidates])
    sizes = sizes_of_parts(lengths, QUERIES_PER_PART)
    source = PairSource("rayembed.jobs.rerank:CandidatePairs", arguments, len(sizes), sizes)
    known = score_pairs(_asked(experiment, model), source, what="rerank", reading=trained_reading(experiment))
    maker = CandidatePairs(**arguments)
    found = np.concatenate([known.lookup(maker.pairs(part)) for part in range(len(sizes))])
    return np.split(found, np.cumsum(lengths)[:-1])


def candidates_file(experiment: Experiment, queries: Store, corpus: Store, candidates: Candidates) -> Path:
    """Rows of the corpus of each query's candidates, as a file in the cache that workers read."""
    ends = np.cumsum([0, *map(len, candidates)])
    rows = np.concatenate(candidates)
    contents = fingerprint([queries.fingerprint, corpus.fingerprint, ends.tolist(), rows.tolist()])
    file = Path(experiment.cache()) / f"candidates-{contents}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as working, working.open("wb") as stream:
            np.savez(stream, ends=ends, rows=rows)
    return file


class CandidatePairs:
    """Pairs of QUERIES_PER_PART queries with their candidates, with the model's instructions."""

    def __init__(self, *, experiment: str, queries: str, corpus: str, candidates: str) -> None:
        self._model = received(experiment).model
        self._queries, self._corpus = Store.open(Path(queries)), Store.open(Path(corpus))
        with np.load(here(Path(candidates))) as file:
            self._ends, self._rows = file["ends"], file["rows"]

    def pairs(self, part: int) -> list[tuple[str, str]]:
        """All of a part."""
        first = part * QUERIES_PER_PART
        last = min(first + QUERIES_PER_PART, self._queries.num_rows)
        queries = self._queries.take(np.arange(first, last), ["text", "prompt"]).to_pylist()
        own = self._rows[self._ends[first] : self._ends[last]]
        passages = [
            passage_text(self._model, text) for text in self._corpus.take(own, ["text"]).column("text").to_pylist()
        ]
        counts = np.diff(self._ends[first : last + 1])
        texts = [query_text(self._model, row["text"], row["prompt"]) for row in queries]
        repeated = [text for text, count in zip(texts, counts.tolist(), strict=True) for _ in range(count)]
        return list(zip(repeated, passages, strict=True))
