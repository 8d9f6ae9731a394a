"""Settings of the search over the corpus."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SearchConfig:
    """How a corpus is searched. Evaluation is exact whatever is said here, and so is mining by flat and torch."""

    backend: Literal["auto", "flat", "torch", "ivf", "hnsw"] = "auto"
    """flat: FAISS, exact. torch: matrix products and top-k, exact. ivf, hnsw: FAISS, approximate, their recall is
    measured and recorded. auto: flat; on a GPU without faiss-gpu, torch."""

    passages_per_index: int = Field(default=65536, ge=1)
    """Passages in memory at once, with their vectors: what one index is built of."""

    passages_per_unit: int = Field(default=262144, ge=1)
    """Passages searched in one unit of work, index after index; a unit leaves its k best of every query on disk."""

    queries_per_unit: int = Field(default=8192, ge=1)
    """Queries searched in one unit of work; their vectors and their best so far are in memory."""

    ivf_lists: int | None = Field(default=None, ge=1)
    """Lists of an ivf index. null: 4 times the square root of its passages."""

    ivf_probes: int = Field(default=16, ge=1)
    """Lists of an ivf index that are looked into for a query."""

    hnsw_neighbors: int = Field(default=32, ge=2)
    """Links of a passage in an hnsw index (M)."""

    hnsw_ef_construction: int = Field(default=80, ge=1)
    """Candidates kept while an hnsw index is built."""

    hnsw_ef_search: int | None = Field(default=None, ge=1)
    """Candidates kept while an hnsw index is searched. null: twice the ranks that are asked for."""

    recall_queries: int = Field(default=100, ge=1)
    """Queries that an approximate search is compared with an exact one on."""
