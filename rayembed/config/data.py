"""Settings of the data: training rows, corpus, evaluation set, how long texts may be, and how data sets are mixed."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.entries import MAPPINGS, entries

DatasetLoss = Literal["info_nce", "symmetric_info_nce", "improved_info_nce", "pointwise_bce", "cosent", "angle"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasetConfig:
    """How one data set, or each that its name stands for, differs from the rest. null: as the rest."""

    name: str
    """Which data sets: a name as `rayembed check` counts rows by, or a glob over names."""

    batch_size: int | None = Field(default=None, ge=1)
    """Queries a worker in one forward pass, over all workers where train.global_batch_size is set. null: that of
    section train, half of it for symmetric types (FlagEmbedding's rule), and data.batch_size_by_length."""

    train_group_size: int | None = Field(default=None, ge=1)
    """Passages a query. null: data.train_group_size; of type only_1neg 2, of symmetric_class no more than the negatives
    and one."""

    prompt: str | None = None
    """Instruction of the queries that bring none of their own. null: the model's."""

    loss: DatasetLoss | None = None
    """null: train.loss_type; cosent (as angle, of scored pairs alone) for type sts."""

    weight: float | None = Field(default=None, gt=0)
    """The share of the batches is multiplied by this (null: by 1): proportional mixing with 2 has each row twice an
    epoch."""

    no_in_batch_neg: bool | None = None
    """A query is compared with its own group alone. null: train.no_in_batch_neg, or true where the name of the file or
    of its folder ends in no_in_batch_neg."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LengthBatchSize:
    """The batch size of texts up to a length."""

    max_len: int = Field(ge=1)
    """Tokens of the longest text of a row, special tokens included."""

    batch_size: int = Field(ge=1)
    """Queries a worker in one forward pass, over all workers where train.global_batch_size is set."""


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

    dev_split: str = "dev"
    """Which qrels/<split>.tsv of the evaluation folder train.eval_steps evaluates on. Another one than
    evaluation_split: who chooses by a split learns nothing from it about new queries."""

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
    """Rows used of each data set, drawn with the seed. null: all."""

    small_threshold: int = Field(default=0, ge=0)
    """Data sets with fewer rows are left out and counted; those of one folder in data.train are put together instead.
    (FlagEmbedding leaves them out silently, and only with same_dataset_within_batch.)"""

    drop_threshold: int = Field(default=0, ge=0)
    """Small data sets of one folder put together are left out where they have fewer rows than this."""

    same_dataset_within_batch: bool = False
    """Each batch is of one data set, the same on every worker. A data set is a file, a BEIR folder, or what rows name
    in `dataset`. Always so for model.family icl, where rows have a type of their own (sts, class, only_1neg,
    symmetric_*), and where a data set has a loss, batch size, group size, weight or no_in_batch_neg of its own."""

    datasets: Annotated[list[DatasetConfig], BeforeValidator(entries(DatasetConfig)), MAPPINGS] = Field(
        default_factory=list
    )
    """What is different for some data sets: name (a glob), batch_size, train_group_size, prompt, loss, weight,
    no_in_batch_neg. Of several entries that match, the first that has a value gives it."""

    mixing: Literal["proportional", "temperature", "round_robin"] = "proportional"
    """How batches of one data set each follow one another. proportional: at random, every row once an epoch.
    temperature: at random, shares as (batches x weight)^(1 / mixing_temperature). round_robin: in turns, equal
    shares."""

    mixing_temperature: float = Field(default=2.0, ge=1)
    """1 is proportional; higher gives small data sets more. Of mixing temperature alone (arXiv:1907.05019)."""

    no_duplicates_within_batch: bool = False
    """No query, and no positive, is in a batch twice: a row that would be waits for a later batch. Rows that find no
    place sit out the epoch and are counted."""

    length_grouping: bool = False
    """Rows of similar length share a batch: less padding. (BGE-M3's efficient batching, without splitting files.)"""

    batch_size_by_length: Annotated[list[LengthBatchSize], BeforeValidator(entries(LengthBatchSize)), MAPPINGS] = Field(
        default_factory=list
    )
    """Entries of max_len (tokens of a row's longest text) and batch_size; longer rows have the batch size of section
    train. Data sets with a batch size of their own keep it. Needs length_grouping."""

    shuffle_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the long positives whose thirds change places. (FlagEmbedding cuts texts of more than 100 characters
    before it makes tokens of them; here the tokens are cut, where there are more than 25.) Passages that are
    read as queries are (of types sts, symmetric_sts and symmetric_clustering) stay as they are."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.batch_size_by_length and not self.length_grouping:
            raise ValueError("data.batch_size_by_length needs data.length_grouping: true")
        bounds = [entry.max_len for entry in self.batch_size_by_length]
        if bounds != sorted(set(bounds)):
            raise ValueError(f"data.batch_size_by_length has max_len {bounds}; allowed: each greater than the last")
        if self.drop_threshold and not self.small_threshold:
            raise ValueError("data.drop_threshold is about small data sets; set data.small_threshold above 0 too")
        return self
