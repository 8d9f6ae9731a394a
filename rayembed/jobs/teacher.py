"""The teacher of section score: what it is, and what its scores depend on."""

from dataclasses import asdict, replace
from typing import Any

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.config.score import ScoreConfig
from rayembed.jobs.miner import with_embedder
from rayembed.jobs.vectors import PROMPTS, batching_reads
from rayembed.models.loading import pooling_of, teacher_kind, weights_fingerprint
from rayembed.models.pairs import PROMPT


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


def teacher_reads(experiment: Experiment) -> dict[str, Any]:
    """What a teacher's scores depend on beside the pairs, for the record of a job and the cache's name."""
    config, kind = teacher_section(experiment), kind_of_teacher(experiment)
    reads: dict[str, Any] = {
        "kind": kind,
        "weights": weights_fingerprint(config.model),
        "max_len": config.max_len,
        "dtype": experiment.encode.dtype,
        **batching_reads(experiment),
    }
    if kind == "embedder":
        model = embedding_teacher(experiment).model
        settings = asdict(model)
        own = {key: settings[key] for key in PROMPTS}
        return {**reads, "query_max_len": experiment.max_len("query"), "pooling": pooling_of(model), "model": own}
    instructions = ("query_instruction_for_rerank", "passage_instruction_for_rerank")
    reads |= {key: getattr(config, key) or "" for key in instructions}
    return reads if kind == "reranker" else {**reads, "prompt": config.prompt or PROMPT}


def embedding_teacher(experiment: Experiment) -> Experiment:
    """The experiment with the embedder that teaches in the place of the model: its weights, pooling and prompts."""
    config = teacher_section(experiment)
    model = ModelConfig(
        name_or_path=config.model,
        pooling=config.pooling,
        query_instruction_for_retrieval=config.query_instruction_for_retrieval,
        passage_instruction_for_retrieval=config.passage_instruction_for_retrieval,
        trust_remote_code=config.trust_remote_code,
    )
    return with_embedder(replace(experiment, mine=None), model)
