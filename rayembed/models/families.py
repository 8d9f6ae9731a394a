"""Families of models as data: what differs between them, so that no trainer is copied."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a kind of model."""

    reads: Literal["texts", "pairs"] = "texts"
    """texts: queries and passages by themselves. pairs: each query together with each passage."""

    backbone: Literal["AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM"] = "AutoModel"
    """Class of transformers that its weights are loaded with."""

    pooling: Literal["cls", "mean", "last_token"] = "cls"
    """Pooling where neither the experiment nor the checkpoint names one."""

    padding_side: Literal["left", "right"] = "right"
    """Side of the padding tokens in a batch."""

    causal: bool = False
    """A decoder: takes adapters, needs position ids where it is padded on the left, ends texts with a token."""

    position_embeddings: str = "position_embeddings"
    """Parameters whose name holds this text are position embeddings."""

    flag_model_class: str
    """Name under which FlagEmbedding's FlagAutoModel or FlagAutoReranker loads the exported folder."""


FAMILIES = {
    "encoder": Family(flag_model_class="encoder-only-base"),
    "m3": Family(flag_model_class="encoder-only-m3"),
    "decoder": Family(pooling="last_token", padding_side="left", causal=True, flag_model_class="decoder-only-base"),
    "icl": Family(pooling="last_token", padding_side="left", causal=True, flag_model_class="decoder-only-icl"),
    "reranker-encoder": Family(
        reads="pairs", backbone="AutoModelForSequenceClassification", flag_model_class="encoder-only-base"
    ),
    "reranker-decoder": Family(
        reads="pairs",
        backbone="AutoModelForCausalLM",
        pooling="last_token",
        padding_side="left",
        causal=True,
        flag_model_class="decoder-only-base",
    ),
}
