"""Settings of training: loss, batches, optimiser, precision, checkpoints."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Contrastive training of the embedder by DeepSpeed, one engine a worker."""

    temperature: float | None = Field(default=None, gt=0)
    """Divides the scores in the loss. Lower puts more weight on the hardest negatives; cosines want 0.01 to 0.05.
    null: 0.02 for embedders, 1 for rerankers, whose scores are logits."""

    negatives_cross_device: bool = True
    """Every worker's passages are negatives of every query, gathered with gradient: the same maths on any number of
    workers. (FlagEmbedding's default is false, and its gradient is 1/W of the exact one.)"""

    no_in_batch_neg: bool = False
    """A query is compared with its own group alone: for classification-like data. Overrides negatives_cross_device."""

    loss_type: Literal["info_nce", "symmetric_info_nce", "improved_info_nce", "pointwise_bce"] = "info_nce"
    """info_nce: a query against passages; of a reranker, listwise over the query's group. symmetric_info_nce: also each
    positive against the queries. improved_info_nce: queries against queries and passages against passages too
    (arXiv:2308.03281). pointwise_bce: each pair by itself, of rerankers alone."""

    scored_pairs_temperature: float = Field(default=0.05, gt=0)
    """Divides the scores in the losses of scored pairs (cosent, angle), as in sentence-transformers."""

    mrl_dims: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Matryoshka (arXiv:2205.13147): the loss is the mean over these lengths of the vectors' beginnings. Empty: off."""

    mask_same_texts: bool = True
    """A passage whose text is a positive of the query in another row of the batch is no negative of it."""

    false_negative_margin: float | None = Field(default=None, ge=-2, le=2)
    """A passage of another row is no negative of a query where its score (cosine) is above the positive's plus this;
    -0.05 also leaves out those just below it. null: all are negatives."""

    guide_model: str | None = None
    """An embedder whose scores decide in place of the trained model's (GISTEmbed, arXiv:2402.16829). null: its own."""

    knowledge_distillation: bool = False
    """Use the teacher's pos_scores and neg_scores. Rows without scores are then refused."""

    kd_loss_type: Literal["kl_div", "m3_kd_loss", "margin_mse"] = "kl_div"
    """kl_div: InfoNCE plus cross-entropy to the teacher inside the group. m3_kd_loss: BGE-M3's loss in its place.
    margin_mse: squared differences of the margins between positive and negatives, in its place (arXiv:2010.02666)."""

    teacher_temperature: float = Field(default=1.0, gt=0)
    """Divides the teacher's scores before their softmax. 1 suits reranker logits (FlagEmbedding); cosines want 0.02."""

    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Queries a worker in one forward pass."""

    global_batch_size: int | None = Field(default=None, ge=1)
    """Queries in one forward pass over all workers; replaces per_device_train_batch_size, so that the number of
    workers can change and the batches stay the same. null: per_device_train_batch_size x ray.num_workers."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches a step of the optimiser. Negatives do not grow with it."""

    sub_batch_size: int | None = Field(default=None, ge=1)
    """Texts in one chunk of the encoder's forward pass, sorted by length: less padding. null: all at once."""

    tokens_per_chunk: Annotated[int, Field(ge=64)] | Literal["probe"] | None = None
    """Most tokens in one chunk of the forward pass, texts sorted by length, chunks of about equal tokens; a chunk has
    at least one text. probe: with grad_cache, what is fastest here and leaves a fifth of the memory free, tried on
    texts of the largest length before the first step; with dropout, another number draws other masks. null: by
    sub_batch_size; with grad_cache 4096 on a CPU, 32768 on a GPU."""

    packed: bool | None = None
    """Texts of a chunk lie one after the other in one row, and no padding is computed. null: where the architecture
    gives the vectors of the padded path, which is tried when training starts. true: any other is refused. false:
    padded."""

    grad_cache: bool = False
    """Hold the activations of one chunk at a time, so that memory does not grow with the batch: a pass without gradient
    for all vectors, then one with gradient for each chunk (GradCache, arXiv:2101.06983). The gradient is the same; a
    step takes about a third more time."""

    torch_compile: bool = False
    """Compile the layers of the backbone by torch.compile: a minute at the start, then faster on a GPU."""

    optim: Literal["adamw_torch", "adamw_bnb_8bit"] = "adamw_torch"
    """adamw_bnb_8bit: bitsandbytes' AdamW with moments in 8 bits, a quarter of their memory (arXiv:2110.02861)."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay; biases and normalisation weights are left out."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""

    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the mean of squared gradients."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm. 0: never."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    """Course of the learning rate after warm-up."""

    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from 0."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of warm-up; replaces warmup_ratio. null: by the ratio."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows."""

    max_steps: int | None = Field(default=None, ge=1)
    """Steps of the optimiser; replaces num_train_epochs. null: by the epochs."""

    bf16: bool = False
    """bfloat16 arithmetic (autocast) over float32 weights."""

    fp16: bool = False
    """float16 arithmetic with DeepSpeed's loss scaling; needs a GPU."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    fix_position_embedding: bool = False
    """Do not train position embeddings."""

    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed settings: a json file (see configs/deepspeed/) or the settings themselves. null: ZeRO stage 0."""

    save_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; what a killed run repeats at most."""

    save_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints, besides those of save_steps, at the end of a step. null: by the steps alone."""

    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept: the last ones; with save_best, the best ones."""

    save_best: bool = False
    """Keep the save_total_limit checkpoints with the lowest mean loss since the one before each, and the last one; with
    eval_steps those with the highest metric_for_best_model, and one is made at each evaluation that is the best so far.
    It does not decide what OUTPUT_DIR/model is: that is the end of training, or as load_best_model_at_end says."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations on data.dev_split, besides that of the base model and that after the last step; the
    training workers do them between steps, and weights stay what they would be without. null: none."""

    eval_passages: int | None = Field(default=None, ge=1)
    """Passages of these evaluations: those that are judged for their queries, and others drawn with the seed up to this
    number; the figures are then higher than on all. null: the whole corpus of data.evaluation."""

    eval_queries: int | None = Field(default=None, ge=1)
    """Most queries of these evaluations, drawn with the seed. null: all of the split."""

    metric_for_best_model: str = Field(default="ndcg@10", pattern=r"^(ndcg|map|recall|precision|mrr)@[1-9]\d*$")
    """Which figure of these evaluations says what is best; the highest is."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Training ends after so many evaluations in succession without a better figure than the best before, the base
    model's included. null: it goes on."""

    load_best_model_at_end: bool = False
    """OUTPUT_DIR/model is the model of the best evaluation, and not that of the last step; the base model itself where
    no step was better. A checkpoint is made at each evaluation that is the best so far."""

    logging_steps: int = Field(default=10, ge=1)
    """Steps between progress lines. metrics.jsonl has every step."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("train.bf16 and train.fp16 are both true; set one of them to false")
        if self.tokens_per_chunk == "probe" and not self.grad_cache:
            raise ValueError(
                "train.tokens_per_chunk is probe, but without train.grad_cache all chunks of a batch are held at once; "
                "set train.grad_cache: true, or train.tokens_per_chunk to null"
            )
        if self.sub_batch_size is not None and self.tokens_per_chunk is not None:
            raise ValueError(
                "train.sub_batch_size and train.tokens_per_chunk both say how large a chunk is; set one to null"
            )
        asked = {
            "eval_passages": self.eval_passages,
            "eval_queries": self.eval_queries,
            "early_stopping_patience": self.early_stopping_patience,
            "load_best_model_at_end": self.load_best_model_at_end or None,
        }
        found = [name for name, value in asked.items() if value is not None]
        if found and self.eval_steps is None:
            raise ValueError(
                f"train.{found[0]} is of evaluations during training, and train.eval_steps is null; set eval_steps to "
                "the steps between them"
            )
        return self

    @property
    def keeps_by_metric(self) -> bool:
        """Whether checkpoints are made and kept by what evaluations say of them."""
        return self.eval_steps is not None and (self.save_best or self.load_best_model_at_end)

    @property
    def evaluations_decide(self) -> bool:
        """Whether the model that is written depends on the evaluations."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None
