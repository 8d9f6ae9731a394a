"""The teacher of section score: what it is, and what its scores depend on."""

from dataclasses import asdict, replace
from typing import Any

from rayembed.config import Experiment
from rayembed.config.score import ScoreConfig
from rayembed.jobs.miner import with_embedder
from rayembed.jobs.vectors import PROMPTS, batching_reads
from rayembed.models.loading import pooling_of, teacher_kind, weights_fingerprint
from rayembed.models.pairs import PairReading
from rayembed.models.rerankers import teacher_reading
from rayembed.models.settings_file import embedder_config

SIDES = ("query", "passage")


def teacher_section(experiment: Experiment) -> ScoreConfig:
    """The section score.

    Raises:
        ValueError: there is none.
    """
    if experiment.score is None:
        raise ValueError("the experiment has no section score; add one with score.model, the teacher")
    return experiment.score


def kind_of_teacher(experiment: Experiment) -> str:
    """The kind of teacher: reranker, decoder-reranker or embedder."""
    config = teacher_section(experiment)
    if config.kind != "auto":
        return config.kind
    return teacher_kind(config.model, trust_remote_code=config.trust_remote_code)


def teacher_reads(experiment: Experiment, reading: PairReading | None = None) -> dict[str, Any]:
    """What a teacher's scores depend on beside the pairs, for the record of a job and the cache's name.

    Args:
        experiment: section score.
        reading: how a reranker reads pairs. None: as section score and the model's rayembed.json say.
    """
    config, kind = teacher_section(experiment), kind_of_teacher(experiment)
    reads: dict[str, Any] = {
        "kind": kind,
        "weights": weights_fingerprint(config.model),
        "max_len": config.longest(),
        "dtype": experiment.encode.dtype,
        **batching_reads(experiment),
    }
    if kind == "embedder":
        teacher = embedding_teacher(experiment)
        model, settings = teacher.model, asdict(teacher.model)
        own = {key: settings[key] for key in PROMPTS}
        family: dict[str, Any] = {} if model.family == "encoder" else {"family": [model.family, model.bidirectional]}
        if teacher.icl is not None:
            family["icl"] = asdict(teacher.icl)
        return {
            **reads,
            "query_max_len": experiment.max_len("query"),
            "pooling": pooling_of(model),
            "model": own,
            **family,
        }
    found = reading or teacher_reading(config)
    reads["max_len"] = found.max_len
    reads |= {f"{side}_instruction_for_rerank": getattr(found, f"{side}_instruction") or "" for side in SIDES}
    if found.trained is not None:
        reads["trained"] = list(found.trained)
    forms = [getattr(found, f"{side}_instruction_format") for side in SIDES]
    if forms != ["{}{}", "{}{}"]:
        reads["formats"] = forms
    return reads if kind == "reranker" else {**reads, "prompt": found.prompt}


def embedding_teacher(experiment: Experiment) -> Experiment:
    """The experiment with the embedder that teaches in the place of the model: its weights, pooling and prompts."""
    config = teacher_section(experiment)
    model = embedder_config(
        config.model,
        pooling=config.pooling,
        query_instruction=config.query_instruction_for_retrieval,
        passage_instruction=config.passage_instruction_for_retrieval,
        trust_remote_code=config.trust_remote_code,
    )
    return with_embedder(replace(experiment, mine=None), model)
