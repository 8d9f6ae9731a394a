"""The whole experiment: one section a job, and the sections that jobs share."""

import os
from typing import Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.data import DataConfig
from rayembed.config.jobs import EncodeConfig, EvaluateConfig, ExportConfig, HarvestConfig
from rayembed.config.mine import MineConfig
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.score import ScoreConfig
from rayembed.config.search import SearchConfig
from rayembed.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Experiment:
    """One experiment file. A job whose section is absent is not part of `rayembed run`."""

    output_dir: str
    """Run folder: everything that the jobs write. A local path, or one that all machines of the cluster share."""

    cache_dir: str | None = None
    """Folder of what is made on the way (texts, vectors, tokens, rankings, teacher scores), kept by what each depends
    on; experiments that name the same one share it. It may be deleted. null: OUTPUT_DIR/cache."""

    seed: int = Field(default=42, ge=0)
    """Everything random is drawn from this."""

    model: ModelConfig
    """The model that is trained."""

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

    @field_validator("output_dir", "cache_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Workers have working directories of their own."""
        if value is None:
            return None
        if "://" in value:
            raise ValueError(
                "must be a local path or a mounted one that all machines share, for now (data may be read from any "
                "filesystem)"
            )
        return os.path.abspath(os.path.expanduser(value))

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
            workers, size = self.ray.num_workers, self.train.global_batch_size
            if size is not None and size % workers:
                raise ValueError(
                    f"train.global_batch_size is {size}, not a multiple of ray.num_workers {workers}; change either"
                )
            if self.train.fp16 and not self.ray.use_gpu:
                raise ValueError("train.fp16 needs a GPU; set ray.use_gpu: true, or train.bf16: true instead")
        if self.mine is not None:
            first, last = map(int, self.mine.range_for_sampling.split("-"))
            if first >= last:
                raise ValueError(f"mine.range_for_sampling is {first}-{last}; its first rank must be below its last")
            self._check_miner(self.mine)
        return self

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

    def global_batch_size(self) -> int:
        """Queries of one forward pass over all workers."""
        assert self.train is not None
        return self.train.global_batch_size or self.train.per_device_train_batch_size * self.ray.num_workers
