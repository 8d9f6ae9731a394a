"""Families of backbones as data: what differs between them, so that no trainer is copied."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a kind of backbone."""

    pooling: Literal["cls", "mean", "last_token"]
    """Pooling where neither the experiment nor the checkpoint names one."""

    padding_side: Literal["left", "right"]
    """Side of the padding tokens in a batch."""

    position_embeddings: str
    """Parameters whose name holds this text are position embeddings."""

    flag_model_class: str
    """Name under which FlagEmbedding's FlagAutoModel loads the exported folder."""


FAMILIES = {
    "encoder": Family(
        pooling="cls",
        padding_side="right",
        position_embeddings="position_embeddings",
        flag_model_class="encoder-only-base",
    ),
}
