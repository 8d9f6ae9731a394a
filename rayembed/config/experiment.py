"""The whole experiment: one section a job, and the sections that jobs share."""

import math
import os
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.data import DataConfig
from rayembed.config.families import IclConfig, LoraConfig, M3Config, RerankerConfig
from rayembed.config.jobs import EncodeConfig, EvaluateConfig, ExportConfig, HarvestConfig, MergeConfig, SplitConfig
from rayembed.config.mine import MineConfig
from rayembed.config.model import ModelConfig
from rayembed.config.places import written_folder
from rayembed.config.ray import RayConfig
from rayembed.config.score import ScoreConfig
from rayembed.config.search import SearchConfig
from rayembed.config.train import TrainConfig
from rayembed.config.tune import TuneConfig

RERANKERS = ("reranker-encoder", "reranker-decoder")
OF_FAMILIES = {  # sections, and the families that have them
    "m3": ("m3",),
    "lora": ("decoder", "icl", "reranker-decoder"),
    "icl": ("icl",),
    "reranker": RERANKERS,
}
DEFAULTS = {"m3": M3Config, "icl": IclConfig, "reranker": RerankerConfig}  # of those that are in force when absent


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Experiment:
    """One experiment file. A job whose section is absent is not part of `rayembed run`."""

    output_dir: str
    """Run folder: everything that the jobs write. A local path, one that all machines of the cluster share, or a URI of
    any filesystem of pyarrow.fs (s3://bucket/folder, gs://...), without keys, of which every machine keeps a copy of
    what it works on in RAYEMBED_SCRATCH (default: a folder in TMPDIR)."""

    cache_dir: str | None = None
    """Folder of what is made on the way (texts, vectors, tokens, rankings, teacher scores), kept by what each depends
    on; experiments that name the same one share it. It may be deleted, and be a URI. null: OUTPUT_DIR/cache."""

    seed: int = Field(default=42, ge=0)
    """Everything random is drawn from this."""

    model: ModelConfig
    """The model that is trained."""

    m3: M3Config | None = None
    """BGE-M3's heads and how they are trained. null: the defaults, for model.family m3."""

    lora: LoraConfig | None = None
    """Low-rank adapters of a decoder. null: all weights are trained."""

    icl: IclConfig | None = None
    """Examples before queries. null: the defaults, for model.family icl."""

    reranker: RerankerConfig | None = None
    """How a pair is put to a reranker. null: the defaults, for the reranker families."""

    data: DataConfig = Field(default_factory=DataConfig)
    """What is read."""

    encode: EncodeConfig = Field(default_factory=EncodeConfig)
    """How texts become vectors."""

    search: SearchConfig = Field(default_factory=SearchConfig)
    """How the corpus is searched."""

    ray: RayConfig = Field(default_factory=RayConfig)
    """Resources."""

    harvest: HarvestConfig | None = None
    """Builds a data set from docstrings. null: not run."""

    mine: MineConfig | None = None
    """Hard-negative mining. null: not run; training rows bring their own negatives."""

    score: ScoreConfig | None = None
    """Teacher scoring. null: not run."""

    train: TrainConfig | None = None
    """Training. null: not run."""

    evaluate: EvaluateConfig | None = None
    """Evaluation of base and tuned model. null: not run."""

    export: ExportConfig | None = None
    """Model card, check and other formats. null: not run."""

    tune: TuneConfig | None = None
    """Sweep over settings. null: not run."""

    split: SplitConfig | None = None
    """Training rows by length, of the job `split`. null: its defaults. No part of `run`."""

    merge: MergeConfig | None = None
    """Adapters to be merged into the model, of the job `merge`. No part of `run`."""

    @field_validator("output_dir", "cache_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else written_folder(value)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if os.path.abspath(self.model.name_or_path) == os.path.join(self.output_dir, "model"):
            raise ValueError(
                f"model.name_or_path is {self.model.name_or_path!r}, the folder that training replaces; choose another "
                "output_dir"
            )
        if self.score is not None and os.path.abspath(self.score.model) == os.path.join(self.output_dir, "model"):
            raise ValueError(
                f"score.model is {self.score.model!r}, the folder that training replaces; copy it elsewhere"
            )
        if self.train is not None:
            self._check_workers(self.train)
            if self.train.fp16 and not self.ray.use_gpu:
                raise ValueError("train.fp16 needs a GPU; set ray.use_gpu: true, or train.bf16: true instead")
            self._check_evaluations(self.train)
        self._check_family()
        self._check_examples()
        if self.mine is not None:
            first, last = map(int, self.mine.range_for_sampling.split("-"))
            if first >= last:
                raise ValueError(f"mine.range_for_sampling is {first}-{last}; its first rank must be below its last")
            self._check_miner(self.mine)
        return self

    def _check_workers(self, train: TrainConfig) -> None:
        """Refuses numbers of workers that the batch cannot be cut for."""
        workers, size = self.ray, train.global_batch_size
        if not workers.elastic:
            if size is not None and size % workers.most_workers:
                raise ValueError(
                    f"train.global_batch_size is {size}, not a multiple of ray.num_workers {workers.most_workers}; "
                    "change either"
                )
            return
        asked = f"ray.num_workers [{workers.fewest_workers}, {workers.most_workers}]"
        if size is None:
            raise ValueError(
                f"{asked} needs a batch that does not depend on the number of workers; set train.global_batch_size to "
                f"{self.nearest_batch_size(self.global_batch_size())}"
            )
        if size % self.batch_step():
            raise ValueError(
                f"train.global_batch_size is {size}, and {asked} needs a multiple of {self.batch_step()}, which any "
                f"number of these workers can share; set it to {self.nearest_batch_size(size)}, or ray.num_workers to "
                "fewer numbers"
            )
        if not workers.max_failures:
            raise ValueError(
                f"{asked} with ray.max_failures 0 would end the run when a worker is lost; set ray.max_failures to the "
                "times that it may go on with others"
            )
        if not (train.negatives_cross_device or train.no_in_batch_neg or self.trains_reranker()):
            raise ValueError(
                f"{asked} with train.negatives_cross_device false would give queries more negatives on fewer workers; "
                "set it to true, or ray.num_workers to one number"
            )

    def _check_evaluations(self, train: TrainConfig) -> None:
        """Refuses evaluations during training that have nothing to evaluate on, or no vectors to do it by."""
        if train.eval_steps is None:
            return
        if self.data.evaluation is None:
            raise ValueError(
                f"train.eval_steps is {train.eval_steps}, and data.evaluation is null; set it to a BEIR folder with "
                f"qrels/{self.data.dev_split}.tsv, or train.eval_steps: null"
            )
        if self.trains_reranker():
            raise ValueError(
                f"train.eval_steps is {train.eval_steps}, and a {self.model.family} has no vectors to rank passages "
                "by; evaluations during training are of embedders: set train.eval_steps: null"
            )

    def _check_family(self) -> None:
        """Refuses settings that a family has no use for, so that none is without effect."""
        family = self.model.family
        for section, families in OF_FAMILIES.items():
            if getattr(self, section) is not None and family not in families:
                raise ValueError(
                    f"section {section} is for model.family {' and '.join(families)}, and this one is {family}; remove "
                    "the section, or change model.family"
                )
        if self.model.bidirectional and family not in ("decoder", "icl"):
            raise ValueError(f"model.bidirectional is for model.family decoder, and this one is {family}")
        if self.model.additional_special_tokens and family not in OF_FAMILIES["lora"]:
            raise ValueError(
                f"model.additional_special_tokens are for model.family {' and '.join(OF_FAMILIES['lora'])}, and this "
                f"one is {family}"
            )
        if self.train is not None:
            self._check_loss(self.train)
        pairs = self.trains_reranker()
        if self.mine is not None and pairs and self.mine.model is None:
            raise ValueError(f"a {family} has no vectors to mine with; set mine.model to an embedder")
        if self.evaluate is not None and pairs != (self.evaluate.retriever is not None):
            needs = "a reranker orders what another finds: set it to an embedder" if pairs else "set it to null"
            raise ValueError(f"evaluate.retriever is {self.evaluate.retriever} and model.family {family}; {needs}")
        if self.evaluate is not None and pairs and self.evaluate.tasks:
            raise ValueError(f"evaluate.tasks are of embedders, and a {family} has no vectors; set evaluate.tasks: []")

    def _check_examples(self) -> None:
        """Refuses what would not know that queries are read after examples."""
        icl = self.family_sections().get("icl")
        if icl is not None and icl.max_examples and self.data.batch_size_by_length:
            raise ValueError(
                "data.batch_size_by_length counts the tokens of queries without their examples; remove it, or set "
                "icl.max_examples: 0"
            )
        if icl is not None and self.train is not None and self.train.guide_model is not None:
            raise ValueError(
                "train.guide_model would read examples and suffix, which it was not trained with; set it to null for "
                "model.family icl"
            )

    def _check_loss(self, train: TrainConfig) -> None:
        """Refuses losses that cannot be had together."""
        pairs, loss = self.trains_reranker(), train.loss_type
        heads = self.model.family == "m3" and (self.m3 is None or self.m3.unified_finetuning)
        of_vectors = ("symmetric_info_nce", "improved_info_nce")
        reasons = {
            "train.loss_type pointwise_bce is of rerankers": loss == "pointwise_bce" and not pairs,
            f"train.loss_type {loss} is of embedders with one vector": loss in of_vectors and (pairs or heads),
            f"train.loss_type {loss} compares with other rows": loss in of_vectors and train.no_in_batch_neg,
            f"train.loss_type {loss} learns from no teacher": loss in of_vectors and train.knowledge_distillation,
            "train.mrl_dims shortens vectors, which a reranker has none of": pairs and bool(train.mrl_dims),
            "train.false_negative_margin is of embedders": pairs and train.false_negative_margin is not None,
            "train.guide_model needs train.false_negative_margin (0 as in GISTEmbed)": (
                train.guide_model is not None and train.false_negative_margin is None
            ),
            "train.false_negative_margin looks at other rows, of which train.no_in_batch_neg leaves none": (
                train.false_negative_margin is not None and train.no_in_batch_neg
            ),
            "train.false_negative_margin has no effect on kd_loss_type margin_mse, which looks at no other row": (
                train.false_negative_margin is not None
                and train.knowledge_distillation
                and train.kd_loss_type == "margin_mse"
            ),
            f"train.kd_loss_type {train.kd_loss_type} is none of pointwise_bce, whose labels a teacher gives": (
                loss == "pointwise_bce" and train.kd_loss_type != "kl_div"
            ),
            "m3.flops_weight needs m3.unified_finetuning": (
                self.m3 is not None and self.m3.flops_weight > 0 and not self.m3.unified_finetuning
            ),
        }
        for reason, wrong in reasons.items():
            if wrong:
                raise ValueError(f"{reason}; model.family is {self.model.family}: change one of the two")

    def _check_miner(self, mine: MineConfig) -> None:
        trained = os.path.join(self.output_dir, "model")
        if mine.model is not None and os.path.abspath(mine.model) == trained:
            raise ValueError(f"mine.model is {mine.model!r}, the folder that training replaces; copy it elsewhere")
        if mine.use_gpu_for_searching and self.search.backend in ("ivf", "hnsw"):
            raise ValueError(
                f"mine.use_gpu_for_searching has no effect with search.backend {self.search.backend}, which runs on "
                "CPUs; set it to false, or search.backend to auto, flat or torch"
            )
        if mine.denoise and self.score is None:
            raise ValueError("mine.denoise needs a teacher; add a section score with score.model, or set it to false")
        if mine.denoise and mine.denoise_margin is None and mine.denoise_max_score is None:
            raise ValueError("mine.denoise drops nothing with denoise_margin and denoise_max_score null; set either")
        own = ("pooling", "query_instruction_for_retrieval", "passage_instruction_for_retrieval")
        given = [f"mine.{key}" for key in own if getattr(mine, key) is not None]
        if given and mine.model is None:
            raise ValueError(
                f"{given[0]} is of mine.model, which is null; set mine.model, or set it in section model instead"
            )
        if mine.rounds > 1 and self.train is None:
            raise ValueError(f"mine.rounds is {mine.rounds}, but nothing is trained between them; add a section train")
        if mine.rounds > 1 and self.trains_reranker():
            raise ValueError(
                f"mine.rounds is {mine.rounds}, and each round mines with the model that the one before it trained; a "
                f"{self.model.family} has no vectors to mine with, and mine.model would find the same again: set "
                "mine.rounds: 1"
            )
        if mine.rounds > 1 and (mine.corpus_embeddings or mine.query_embeddings):
            raise ValueError(
                f"mine.rounds is {mine.rounds}, but given embeddings are of one model, and later rounds mine with "
                "another; set mine.rounds: 1, or remove mine.corpus_embeddings and mine.query_embeddings"
            )

    def cache(self) -> str:
        """Folder of what is made on the way."""
        return self.cache_dir or os.path.join(self.output_dir, "cache")

    def max_len(self, side: str) -> int:
        """Tokens kept of a text when it is encoded; `side` is query or passage."""
        own: int | None = getattr(self.encode, f"{side}_max_len")
        default: int = getattr(self.data, f"{side}_max_len")
        return default if own is None else own

    def passages_per_unit(self) -> int:
        """Passages in one unit of work."""
        return self.encode.passages_per_unit or (8192 if self.ray.use_gpu else 512)

    def tokens_per_chunk(self) -> int | None:
        """Tokens in one chunk of the forward pass in training, before any probe. None: no limit."""
        assert self.train is not None
        told = self.train.tokens_per_chunk
        if isinstance(told, int):
            return told
        if self.train.grad_cache and self.train.sub_batch_size is None:
            return 32768 if self.ray.use_gpu else 4096
        return None

    def temperature(self) -> float:
        """What divides the scores in the loss."""
        assert self.train is not None
        return self.train.temperature or (1.0 if self.trains_reranker() else 0.02)

    def family_sections(self) -> dict[str, Any]:
        """The sections of the model's family as they are in force, by their names."""
        names = [name for name, families in OF_FAMILIES.items() if self.model.family in families]
        found = {name: getattr(self, name) or (DEFAULTS[name]() if name in DEFAULTS else None) for name in names}
        return {name: section for name, section in found.items() if section is not None}

    def trains_reranker(self) -> bool:
        """Whether the model reads pairs: it scores, and has no vectors to mine or to search with."""
        return self.model.family in RERANKERS

    def global_batch_size(self) -> int:
        """Queries of one forward pass over all workers."""
        assert self.train is not None
        return self.train.global_batch_size or self.train.per_device_train_batch_size * self.ray.most_workers

    def batch_step(self) -> int:
        """What the queries of a batch are a multiple of, so that any number of workers shares them evenly."""
        return math.lcm(*range(self.ray.fewest_workers, self.ray.most_workers + 1))

    def nearest_batch_size(self, size: int) -> int:
        """The multiple of `batch_step` that is nearest to a number of queries."""
        step = self.batch_step()
        return max(1, round(size / step)) * step
