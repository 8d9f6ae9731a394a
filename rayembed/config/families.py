"""Settings of one family of models each: BGE-M3's heads, adapters of decoders, the pairs of rerankers."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.entries import MAPPINGS, entries


@dataclass(frozen=True, kw_only=True, config=STRICT)
class M3Config:
    """Training of BGE-M3's three heads together (arXiv:2402.03216); of family m3 alone."""

    unified_finetuning: bool = True
    """Train the sparse and the ColBERT head too, and the sum of all three. (FlagEmbedding's default is false; its
    published recipe says true.)"""

    use_self_distill: bool = True
    """The sum of the three heads' scores teaches each of them. (FlagEmbedding's default is false; see above.)"""

    self_distill_start_step: int = Field(default=0, ge=0)
    """Steps of the optimiser before self-distillation begins. (FlagEmbedding counts forward passes and forgets the
    count when it resumes.)"""

    fix_encoder: bool = False
    """Train the sparse and the ColBERT head alone."""

    colbert_dim: int | None = Field(default=None, ge=1)
    """Dimensions of a ColBERT vector where the checkpoint brings no head. null: those of the encoder."""

    sparse_score_weight: float = Field(default=0.3, ge=0)
    """Weight of the sparse score in the sum of the three; dense and ColBERT have 1."""

    sparse_loss_weight: float = Field(default=0.1, ge=0)
    """Weight of the sparse head's loss; the other three (dense, ColBERT, sum) have 1."""

    flops_weight: float = Field(default=0.0, ge=0)
    """Weight of the FLOPS regulariser (arXiv:2004.05665), which makes sparse vectors sparser. 0: off."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.fix_encoder and not self.unified_finetuning:
            raise ValueError("m3.fix_encoder with unified_finetuning: false leaves nothing to train; change either")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters by peft (arXiv:2106.09685); of decoder families.

    OUTPUT_DIR/model is base and adapter merged, which loads everywhere; OUTPUT_DIR/adapter is the adapter by itself.
    (FlagEmbedding writes the adapter alone, unless save_merged_lora_model says otherwise.)
    """

    lora_rank: int = Field(default=64, ge=1)
    """Rank of the adapters."""

    lora_alpha: float = Field(default=16, gt=0)
    """The adapters' output is scaled by lora_alpha / lora_rank."""

    lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the adapters."""

    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Names of the linear layers that get an adapter. null: the family's (all of attention and feed-forward)."""

    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole and saved with the adapter."""

    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (NF4, double quantisation: QLoRA, arXiv:2305.14314). Needs bitsandbytes (extra
    qlora) and ZeRO 0 to 2. The adapter is merged into the base as it was before it was quantised."""

    from_peft: str | None = None
    """Folder of an adapter whose training goes on. null: a new one."""

    raw_peft: list[str] = Field(default_factory=list)
    """Folders of adapters that are merged into the base, in this order, before training begins."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.load_in_4bit and self.raw_peft:
            raise ValueError(
                "lora.raw_peft cannot be merged into a base that lora.load_in_4bit holds in 4 bits; merge it first "
                "(the job merge) and set model.name_or_path to the result, or set load_in_4bit to false"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExampleConfig:
    """A query with a passage that answers it, which an in-context-learning embedder reads before other queries."""

    query: str
    """The query, without instruction."""

    response: str
    """What answers it; of a classification the name of the class."""

    instruct: str | None = None
    """Instruction of the query. null: the model's."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IclConfig:
    """In-context-learning embedders (bge-en-icl, arXiv:2409.15700); of family icl.

    A query is read after some examples of its task, and before a suffix. In training the examples are other rows of the
    same batch, drawn for each query anew; elsewhere they are examples_for_task.
    """

    icl_suffix_str: str = Field(default="\\n<response>", min_length=1)
    """Put after every query, in training as everywhere else. A written \\n is a line break. (FlagEmbedding trains with
    another default than it embeds with, and reads a written \\n in training as a backslash and an n.)"""

    retrieval_use_examples: bool = True
    """Examples for all data sets. false: for those of types class and symmetric_* alone. Queries of scored pairs
    (sts) have none."""

    max_examples: int = Field(default=5, ge=0)
    """A query of training has 0 to this many examples, each number as likely."""

    example_query_max_len: int = Field(default=64, ge=4)
    """Tokens kept of an example's query, its instruction included."""

    example_passage_max_len: int = Field(default=96, ge=4)
    """Tokens kept of an example's passage."""

    examples_max_len: int = Field(default=1536, ge=8)
    """Tokens of all examples of a query, beside data.query_max_len; those that come later are left out. (FlagEmbedding
    takes them out of query_max_len, of which it keeps 512 for the query: with 512 or less there are no examples.)"""

    examples_for_task: Annotated[list[ExampleConfig], BeforeValidator(entries(ExampleConfig)), MAPPINGS] = Field(
        default_factory=list
    )
    """Examples before every query in mining, evaluation and encoding: entries of query, response and instruct. Empty:
    none. Nothing of them is cut off."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RerankerConfig:
    """How a (query, passage) pair is put to a reranker that is trained; of the reranker families."""

    prompt: str | None = None
    """What a decoder is asked after query and passage. null: the prompt of BGE's rerankers."""
