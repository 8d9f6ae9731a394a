"""Settings of the job mine: the window of ranks, the filters, the draw, rounds."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.model import Pooling


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MineConfig:
    """Hard negatives: passages that the model ranks high for a query and that are not its positives."""

    model: str | None = None
    """Embedder that ranks the corpus, with the three settings below. null: the model of section model, with its own."""

    pooling: Pooling | None = None
    """Of mine.model. null: what its files say, else cls, of a decoder last_token."""

    query_instruction_for_retrieval: str | None = None
    """Text that mine.model wants before every query. null: what its rayembed.json says, else nothing."""

    passage_instruction_for_retrieval: str | None = None
    """Text that mine.model wants before every passage. null: what its rayembed.json says, else nothing."""

    corpus_embeddings: list[str] = Field(default_factory=list)
    """Vectors of data.corpus in place of encoding it: parquet (id, vector), npy with ids beside (as the job `encode`
    writes both), or npy in the order of the corpus; files, folders or globs. Empty: encoded."""

    query_embeddings: list[str] = Field(default_factory=list)
    """Vectors of the training rows' queries in place of encoding them; the ids are query ids. Empty: encoded."""

    range_for_sampling: str = Field(default="10-210", pattern=r"^\d+-\d+$")
    """Window of ranks that negatives are drawn from, first included, last excluded, counted from 0."""

    negative_number: int = Field(default=15, ge=1)
    """Negatives a query."""

    sampling_strategy: Literal["random", "top", "weighted"] = "random"
    """Which of the candidates that are left: drawn evenly, the best ranked, or drawn with weight 1 / (1 + place)."""

    fill_up: bool = True
    """Draw random passages of the corpus where the window holds too few, none that scores above all of the window; how
    many is counted in stats.json."""

    min_score: float | None = None
    """Drops candidates that score below this. null: no bound."""

    max_score: float | None = None
    """Drops candidates that score above this. null: no bound."""

    absolute_margin: float | None = Field(default=None, ge=0)
    """Drops candidates that score above the positive minus this. null: no bound."""

    relative_margin: float | None = Field(default=None, ge=0)
    """Drops candidates that score above p - |p| x this, p the positive's score: 0.05 keeps at most 95% of it
    (TopK-PercPos of NV-Retriever, arXiv 2407.15831, right for negative scores too). null: no bound."""

    margin_positive: Literal["lowest", "highest"] = "lowest"
    """Which of several positives' scores the margins are measured from."""

    near_duplicate: float | None = Field(default=0.9, gt=0, le=1)
    """Drops candidates whose words' 3-grams overlap with those of a positive at least so much (Jaccard similarity;
    1: the same 3-grams). null: only what reads the same, white space and case aside."""

    max_uses: int | None = Field(default=None, ge=1)
    """Training rows that one passage may be a negative of; they are served in their order. null: no limit."""

    denoise: bool = False
    """Lets the teacher of section score judge the candidates that the other filters leave: what it likes is dropped."""

    denoise_margin: float | None = 0.0
    """Drops a candidate whose teacher score is above that of the query's positive (margin_positive says which) minus
    this. null: no bound."""

    denoise_max_score: float | None = None
    """Drops a candidate whose teacher score is above this. null: no bound."""

    denoise_candidates: int | None = Field(default=None, ge=1)
    """Candidates a query that the teacher scores, the first in the order of the draw; the others are no negatives.
    null: all that the other filters leave."""

    audit_queries: int = Field(default=64, ge=0)
    """Queries whose negatives the teacher of section score judges for the audit, where `denoise` does not do it for
    all."""

    rounds: int = Field(default=1, ge=1)
    """Rounds of mining and training in `rayembed run`: each mines with the model that the round before it trained, and
    trains that on. The teacher stays the same. Earlier rounds are kept in OUTPUT_DIR/rounds/."""

    use_gpu_for_searching: bool = False
    """Search on the GPU of each worker: by faiss-gpu where it is installed (extra `gpu`), else by torch."""
