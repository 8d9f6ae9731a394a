"""The whole experiment: one section a job, and the sections that jobs share."""

import os
from typing import Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.data import DataConfig
from rayembed.config.jobs import EncodeConfig, EvaluateConfig, ExportConfig, HarvestConfig, MineConfig, ScoreConfig
from rayembed.config.model import ModelConfig
from rayembed.config.ray import RayConfig
from rayembed.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Experiment:
    """One experiment file. A job whose section is absent is not part of `rayembed run`."""

    output_dir: str
    """Run folder: everything that the jobs write. A local path, or one that all machines of the cluster share."""

    seed: int = Field(default=42, ge=0)
    """Everything random is drawn from this."""

    model: ModelConfig
    """The model that is trained."""

    data: DataConfig = Field(default_factory=DataConfig)
    """What is read."""

    encode: EncodeConfig = Field(default_factory=EncodeConfig)
    """How texts become vectors."""

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

    @field_validator("output_dir")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Workers have working directories of their own."""
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
        return self

    def max_len(self, side: str) -> int:
        """Tokens kept of a text when it is encoded; `side` is query or passage."""
        own: int | None = getattr(self.encode, f"{side}_max_len")
        default: int = getattr(self.data, f"{side}_max_len")
        return default if own is None else own

    def global_batch_size(self) -> int:
        """Queries of one forward pass over all workers."""
        assert self.train is not None
        return self.train.global_batch_size or self.train.per_device_train_batch_size * self.ray.num_workers
