"""Settings of the teacher: the job score, and the denoising of mined negatives."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.model import Pooling


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreConfig:
    """A teacher's scores of every (query, passage) pair of the training rows."""

    model: str
    """Teacher: hub id, local folder or package://..., a reranker or an embedder. One that rayembed trained reads rows
    with their own prompts and types, as in its training; one that was trained elsewhere gets bare texts with the
    instructions below: a row's prompt is of the model that is trained."""

    kind: Literal["auto", "reranker", "decoder-reranker", "embedder"] = "auto"
    """What the teacher is: a cross-encoder (sequence classification with one label), a decoder whose logit of "Yes" is
    the score, or an embedder. auto: by the class that the checkpoint's config names, and whether it has
    sentence-transformers files."""

    max_len: int | None = Field(default=None, ge=8)
    """Tokens kept of a (query, passage) pair, or of a passage when the teacher is an embedder. null: 512; of a teacher
    that rayembed trained, as in its training."""

    pooling: Pooling | None = None
    """Of an embedder. null: what its files say, else cls, of a decoder last_token."""

    query_instruction_for_retrieval: str | None = None
    """Text that an embedder wants before every query. null: what its
    rayembed.json says, else nothing."""

    passage_instruction_for_retrieval: str | None = None
    """Text that an embedder wants before every passage. null: what its
    rayembed.json says, else nothing."""

    query_instruction_for_rerank: str | None = None
    """Text that a reranker wants before every query (BGE's decoders: "A: "). null: what its
    rayembed.json says, else nothing."""

    passage_instruction_for_rerank: str | None = None
    """Text that a reranker wants before every passage (BGE's decoders: "B: "). null: what its
    rayembed.json says, else nothing."""

    prompt: str | None = None
    """Task that a decoder-reranker reads after the pair. null: what its rayembed.json says, else that of BGE's
    decoder rerankers."""

    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Only for sources that you trust."""

    def longest(self) -> int:
        """Tokens kept where the teacher's own folder does not say how pairs are cut."""
        return 512 if self.max_len is None else self.max_len
