"""The embedder that mines: the model that is trained, or another one with its own settings."""

from dataclasses import replace
from typing import Any

from rayembed.config import Experiment
from rayembed.config.families import IclConfig
from rayembed.config.model import ModelConfig
from rayembed.models.settings_file import embedder_config, read_settings

LENGTHS = ("query_max_len", "passage_max_len")


def miner(experiment: Experiment) -> Experiment:
    """The experiment with the embedder that mines in the place of the model: its weights, pooling and instructions.

    Where mine.model is null the model mines, and the experiment is the same. Else it has no section train, and one
    round of mining, which is what one embedder does.
    """
    config = experiment.mine
    if config is None or config.model is None:
        return experiment
    model = embedder_config(
        config.model,
        pooling=config.pooling,
        query_instruction=config.query_instruction_for_retrieval,
        passage_instruction=config.passage_instruction_for_retrieval,
        trust_remote_code=experiment.model.trust_remote_code,
    )
    return with_embedder(replace(experiment, mine=replace(config, rounds=1)), model)


def with_embedder(experiment: Experiment, model: ModelConfig) -> Experiment:
    """The experiment with an embedder that is there in the place of the model that is trained.

    Of its rayembed.json it has the lengths of texts, where section encode has none, and what is said of in-context
    learning.
    """
    told = read_settings(model.name_or_path) or {}
    icl = IclConfig(**told["icl"]) if model.family == "icl" and "icl" in told else None
    lengths: dict[str, Any] = {name: getattr(experiment.encode, name) or told.get(name) for name in LENGTHS}
    return replace(
        experiment,
        model=model,
        encode=replace(experiment.encode, **lengths),
        m3=None,
        lora=None,
        icl=icl,
        reranker=None,
        train=None,
        evaluate=None,
    )
