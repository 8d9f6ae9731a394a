"""The embedder that mines: the model that is trained, or another one with its own settings."""

from dataclasses import replace

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig


def miner(experiment: Experiment) -> Experiment:
    """The experiment with the embedder that mines in the place of the model: its weights, pooling and instructions.

    Where mine.model is null the model mines, and the experiment is the same. Else it has no section train, and one
    round of mining, which is what one embedder does.
    """
    config = experiment.mine
    if config is None or config.model is None:
        return experiment
    decoder = experiment.model.family == "decoder"
    model = ModelConfig(
        name_or_path=config.model,
        family="decoder" if decoder else "encoder",
        pooling=config.pooling,
        query_instruction_for_retrieval=config.query_instruction_for_retrieval,
        passage_instruction_for_retrieval=config.passage_instruction_for_retrieval,
        trust_remote_code=experiment.model.trust_remote_code,
    )
    return with_embedder(replace(experiment, mine=replace(config, rounds=1)), model)


def with_embedder(experiment: Experiment, model: ModelConfig) -> Experiment:
    """The experiment with another model in the place of the one that is trained, without the sections of families."""
    return replace(experiment, model=model, m3=None, lora=None, reranker=None, train=None, evaluate=None)
