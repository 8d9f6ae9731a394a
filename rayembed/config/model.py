"""Settings of the model that is trained: where its weights are and how its tokens become one vector."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT

Family = Literal["encoder", "m3", "decoder", "icl", "reranker-encoder", "reranker-decoder"]
Pooling = Literal["cls", "mean", "last_token"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The model that is trained, and how texts are put to it."""

    name_or_path: str
    """Weights: a hub id, a local folder, or package://installed_package/folder."""

    family: Family = "encoder"
    """encoder: one vector a text from a bidirectional encoder (BERT, RoBERTa, XLM-R, MPNet, ...). m3: BGE-M3's dense,
    sparse and ColBERT vectors. decoder: one vector from a causal model (Qwen, Mistral, Llama, Gemma, ...).
    icl: a decoder that reads a query after examples of its task (bge-en-icl). reranker-encoder, reranker-decoder: one
    score a (query, passage) pair."""

    pooling: Pooling | None = None
    """How token vectors become one. null: what the checkpoint's sentence-transformers files say, else the family's."""

    normalize_embeddings: bool = True
    """Scale vectors to length 1, so that scores are cosines."""

    query_instruction_for_retrieval: str | None = None
    """Text put before every query that has no prompt of its own; before those of a reranker too (FlagEmbedding's
    query_instruction_for_rerank). Never before texts of types sts and class, nor of evaluate.tasks: these are not of
    retrieval, and have the prompt of their row, dataset (data.datasets) or task, or none. null: nothing is put."""

    query_instruction_format: str = Field(default="{}{}", pattern=r"^[^{}]*\{\}[^{}]*\{\}[^{}]*$")
    """How instruction and query are joined; holds two {} (instruction, query). A written \\n is a line break."""

    passage_instruction_for_retrieval: str | None = None
    """Text put before every passage. null: nothing is put."""

    passage_instruction_format: str = Field(default="{}{}", pattern=r"^[^{}]*\{\}[^{}]*\{\}[^{}]*$")
    """How instruction and passage are joined; holds two {} (instruction, passage)."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of hidden states and attention while training. null: as the checkpoint says."""

    additional_special_tokens: list[str] = Field(default_factory=list)
    """Tokens that are added to the vocabulary; their new embeddings are trained, also under section lora."""

    bidirectional: bool = False
    """Let a decoder's tokens see those after them too. Only family decoder."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for sources that you trust."""
