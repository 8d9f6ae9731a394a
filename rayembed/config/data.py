"""Settings of the data: training rows, corpus, evaluation set, and how long texts may be."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is read. Paths are files, folders or globs, local or on any filesystem of pyarrow.fs (s3://, gs://, ...)."""

    train: list[str] = Field(default_factory=list)
    """Training rows: jsonl, json or parquet files, folders of them, globs, or BEIR folders (their `train` qrels).
    An id that two of them use for different texts becomes SOURCE:ID in the second."""

    corpus: list[str] = Field(default_factory=list)
    """Candidate pool: jsonl or parquet of passages, or BEIR folders. Empty: all passages of the training rows."""

    evaluation: str | None = None
    """BEIR folder (corpus.jsonl, queries.jsonl, qrels/) that base and tuned model are compared on."""

    evaluation_split: str = "test"
    """Which qrels/<split>.tsv of the evaluation folder is used."""

    train_group_size: int = Field(default=8, ge=1)
    """Passages a query in training: one positive and train_group_size - 1 negatives."""

    min_grade: int = Field(default=1, ge=1)
    """Least grade in a BEIR folder's qrels that makes a passage a positive of training. A passage with a lower one
    above 0 is neither a positive nor mined as a negative."""

    query_max_len: int = Field(default=32, ge=4)
    """Tokens kept of a query, special tokens included."""

    passage_max_len: int = Field(default=128, ge=4)
    """Tokens kept of a passage, special tokens included."""

    pad_to_multiple_of: int | None = Field(default=None, ge=1)
    """Pad batches to a multiple of this many tokens (8 helps tensor cores). null: to the longest text."""

    max_example_num_per_dataset: int | None = Field(default=None, ge=1)
    """Rows used of each training source, drawn with the seed. null: all."""
