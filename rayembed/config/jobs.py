"""Settings of the small jobs; mine, score and train have files of their own."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.entries import MAPPINGS, entries


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HarvestConfig:
    """Builds a BEIR folder from the docstrings of installed Python packages: real data without a download."""

    output: str
    """Folder that is written, local or a URI: corpus.jsonl, queries.jsonl, qrels/{train,dev,test}.tsv."""

    packages: list[str] = Field(default_factory=list)
    """Top-level packages to read. Empty: the standard library (named stdlib) and the
    packages that rayembed depends on."""

    min_query_words: int = Field(default=3, ge=1)
    """Shortest summary line that becomes a query, in words."""

    min_passage_words: int = Field(default=12, ge=1)
    """Shortest docstring body that becomes a passage, in words."""

    max_pairs: int | None = Field(default=None, ge=1)
    """Keep at most this many pairs, chosen by a hash of the name so that reruns agree. null: all."""

    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of modules (not of pairs) whose pairs go to the test split."""

    dev_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of modules whose pairs go to the dev split."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncodeConfig:
    """How texts become vectors in mining, scoring and evaluation, and what the job `encode` writes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass; pooling is float32. auto: bfloat16 where the hardware has it, else float32."""

    query_max_len: int | None = Field(default=None, ge=4)
    """Tokens kept of a query. null: data.query_max_len; of another embedder that rayembed trained (mine.model,
    evaluate.retriever, score.model), as in its training."""

    passage_max_len: int | None = Field(default=None, ge=4)
    """Tokens kept of a passage; not of an embedder that teaches (score.max_len). null: data.passage_max_len; of another
    embedder that rayembed trained, as in its training."""

    tokens_per_batch: int | None = Field(default=None, ge=64)
    """Tokens in one forward pass, padding included; texts are sorted by length first. null: 4096 on a CPU (what its
    caches hold), 65536 on a GPU."""

    passages_per_unit: int | None = Field(default=None, ge=1)
    """Passages in one unit of work (its part of the corpus): what is lost when a worker dies, and what it holds.
    null: 512 on a CPU, 8192 on a GPU: some seconds of work."""

    queries_per_unit: int = Field(default=512, ge=1)
    """Queries in one unit of work when rankings are merged or rows are scored."""

    model: str | None = None
    """Embedder of the job `encode`: hub id, local folder or package://... null: OUTPUT_DIR/model, else model."""

    output_format: Literal["parquet", "npy"] = "parquet"
    """What the job `encode` writes: parquet (id, vector), or npy with a file of ids beside each."""

    output_dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    """Numbers of the vectors that the job `encode` writes. int8: 256 steps between the least and the greatest value of
    each dimension in a sample of the passages; binary: one bit a dimension, packed into bytes (uint8)."""

    dimensions: int | None = Field(default=None, ge=1)
    """First dimensions that the job `encode` keeps (Matryoshka models), scaled to length 1 again where
    model.normalize_embeddings says so. null: all."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """What base and tuned model are compared on beside retrieval: scored pairs, or labelled texts."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """By which the figures are called."""

    kind: Literal["sts", "classification", "clustering"]
    """sts: Spearman correlation of cosines with the scores of {"sentence1", "sentence2", "score"}. classification:
    accuracy of a classifier of the vectors of {"text", "label"}. clustering: v-measure of k-means, as many clusters as
    there are labels."""

    test: list[str] = Field(min_length=1)
    """Files, folders or globs of the rows that are judged."""

    train: list[str] = Field(default_factory=list)
    """Rows that the classifier learns from. Of kind classification alone, which needs them."""

    classifier: Literal["logistic_regression", "knn"] | None = None
    """Of kind classification: logistic regression, or the majority of the 5 nearest texts. null: logistic
    regression."""

    prompt: str | None = None
    """Instruction put before every text whose row brings none of its own, by model.query_instruction_format. null:
    none."""

    max_len: int | None = Field(default=None, ge=4)
    """Tokens kept of a text. null: the longer of those of a query and of a passage (section encode, else data)."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        classifies = self.kind == "classification"
        if classifies != bool(self.train):
            needs = "needs rows that the classifier learns from: set" if classifies else "trains nothing: drop"
            raise ValueError(f"task {self.name!r} of kind {self.kind} {needs} train")
        if self.classifier is not None and not classifies:
            raise ValueError(f"task {self.name!r} of kind {self.kind} has no classifier: drop it")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Base and tuned model on the full corpus of data.evaluation, and on further tasks."""

    k_values: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1, 3, 5, 10, 100], min_length=1)
    """Cut-offs of every metric; the largest is how many passages are retrieved a query."""

    retriever: str | None = None
    """Embedder whose rankings a reranker (model.family) brings into a better order; with the instructions that its
    rayembed.json tells, else without. null: none, which is right for embedders alone."""

    rerank_top_k: int = Field(default=100, ge=1)
    """Passages a query that a reranker reads, the retriever's best; and that BGE-M3's heads are compared on."""

    significance_metric: str = Field(default="ndcg@10", pattern=r"^(ndcg|map|recall|precision|mrr)@\d+$")
    """Metric whose difference, base against tuned, is tested and whose queries won and lost are shown."""

    tasks: Annotated[list[TaskConfig], BeforeValidator(entries(TaskConfig)), MAPPINGS] = Field(default_factory=list)
    """Tasks beside retrieval: entries of name, kind (sts, classification, clustering), test, and of classification
    train and classifier. With tasks, data.evaluation may be null. Of embedders alone."""

    num_permutations: int = Field(default=10000, ge=100)
    """Sign flips of the paired randomisation test; the smallest p-value is one over this plus one."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate.tasks has the names {', '.join(names)}; allowed: each once")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """Writes the model card with the measured figures, checks the vectors, and writes other formats beside model/."""

    formats: list[Literal["float16", "bfloat16"]] = Field(default_factory=list)
    """Copies of model/ with weights of this type, written to model-float16/ and so on."""

    probe_texts: int = Field(default=64, ge=2)
    """Texts whose vectors are compared between training and the exported folder (cosine at least 0.9999)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SplitConfig:
    """Writes data.train to OUTPUT_DIR/split, a file for each range of lengths: FlagEmbedding's split_data_by_length."""

    length_list: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [0, *range(500, 7001, 500)], min_length=1
    )
    """Tokens where each range begins, the first 0; the last has no end. A row's length is that of its longest text,
    special tokens included and nothing cut off."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MergeConfig:
    """Merges saved adapters into model.name_or_path and writes OUTPUT_DIR/merge, without training.

    FlagEmbedding's only_merge_lora_model.
    """

    adapters: list[str] = Field(min_length=1)
    """Folders of adapters, merged in this order."""
