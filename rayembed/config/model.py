"""Settings of the model that is trained: where its weights are and how its tokens become one vector."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT

Pooling = Literal["cls", "mean", "last_token"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The model that is trained, and how texts are put to it."""

    name_or_path: str
    """Weights: a hub id, a local folder, or package://installed_package/folder."""

    family: Literal["encoder"] = "encoder"
    """Kind of backbone (BERT, RoBERTa, XLM-R, MPNet, ...: bidirectional encoders)."""

    pooling: Pooling | None = None
    """How token vectors become one. null: what the checkpoint's sentence-transformers files say, else the family's."""

    normalize_embeddings: bool = True
    """Scale vectors to length 1, so that scores are cosines."""

    query_instruction_for_retrieval: str | None = None
    """Text put before every query that has no prompt of its own. null: nothing is put."""

    query_instruction_format: str = Field(default="{}{}", pattern=r"^[^{}]*\{\}[^{}]*\{\}[^{}]*$")
    """How instruction and query are joined; holds two {} (instruction, query). A written \\n is a line break."""

    passage_instruction_for_retrieval: str | None = None
    """Text put before every passage. null: nothing is put."""

    passage_instruction_format: str = Field(default="{}{}", pattern=r"^[^{}]*\{\}[^{}]*\{\}[^{}]*$")
    """How instruction and passage are joined; holds two {} (instruction, passage)."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of hidden states and attention while training. null: as the checkpoint says."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for sources that you trust."""
