"""Settings of one family of models each: BGE-M3's heads, adapters of decoders, the pairs of rerankers."""

from typing import Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT


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

    from_peft: str | None = None
    """Folder of an adapter whose training goes on. null: a new one."""

    raw_peft: list[str] = Field(default_factory=list)
    """Folders of adapters that are merged into the base, in this order, before training begins."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RerankerConfig:
    """How a (query, passage) pair is put to a reranker that is trained; of the reranker families."""

    prompt: str | None = None
    """What a decoder is asked after query and passage. null: the prompt of BGE's rerankers."""
