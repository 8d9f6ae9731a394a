"""The embedder that mines: the model that is trained, or another one with its own settings."""

from dataclasses import replace

from rayembed.config import Experiment
from rayembed.config.families import IclConfig
from rayembed.config.model import ModelConfig
from rayembed.models.settings_file import embedder_config, read_settings


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

    Of the sections of families it has what the embedder's rayembed.json says of in-context learning.
    """
    told = read_settings(model.name_or_path) or {}
    icl = IclConfig(**told["icl"]) if model.family == "icl" and "icl" in told else None
    return replace(experiment, model=model, m3=None, lora=None, icl=icl, reranker=None, train=None, evaluate=None)
