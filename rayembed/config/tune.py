"""Settings of the job tune: which settings are tried, how they are searched, when a trial is stopped."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.space import Dimension, parse_space

METRIC = re.compile(r"(ndcg|map|recall|precision|mrr)@[1-9]\d*")
NUM_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TuneConfig:
    """A sweep: trials train with other values of some settings, and are compared on the dev split.

    A trial's figure is the best of its evaluations in training; the test split has no part in it.
    """

    space: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of settings, and what each may be: {choice: [...]} (or grid, which is the same), {uniform: [low,
    high]}, {loguniform: [low, high]}, {quniform: [low, high, step]}, {randint: [low, high]}, ends included. With
    {when: {key: value or list of values}} beside it, where a choice before it has this value alone; of a list of such
    entries the first that holds counts, and where none does, the setting stays as it is."""

    search: Literal["random", "grid", "optuna"] = "random"
    """random: drawn by the seed, the same at every call. grid: every combination of the choices. optuna: after a few
    random trials, near those that did well (Optuna's TPE)."""

    num_samples: int | None = Field(default=None, ge=1)
    """Trials in all, those of earlier calls included: with more, `rayembed tune` again adds some. null: 8; of search
    grid as many as there are."""

    baseline: bool = True
    """The first trial is the experiment as it is, so that the table tells what the best values win over it. It is one
    of num_samples, and is never stopped early."""

    metric: str = "ndcg@10"
    """What trials are compared by, the higher the better: ndcg, map, recall, precision or mrr, at a number."""

    scheduler: Literal["none", "asha"] = "none"
    """asha: of the trials that came as far, only the best 1 / reduction_factor train on (ASHA, arXiv:1810.05934)."""

    grace_evaluations: int = Field(default=1, ge=1)
    """Evaluations of a trial before asha may stop it; it looks again after reduction_factor times as many."""

    reduction_factor: float = Field(default=3.0, gt=1)
    """Of asha: one trial in so many goes on at each look."""

    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time. null: as many as the cluster has room for, each with ray.num_workers."""

    max_failures: int = Field(default=1, ge=0)
    """Times that a trial goes on from its last checkpoint after it was lost, beside ray.max_failures of its workers. A
    loss that is no number and settings that are refused are not tried again."""

    keep_models: bool = False
    """Keep model and checkpoints of trials that are done."""

    then: Literal["train"] | None = None
    """train: the best values go into OUTPUT_DIR: it is trained, evaluated and exported with them. null: the sweep is
    the end of `rayembed run` too, and tune/best.yaml the experiment to run next."""

    @field_validator("metric")
    @classmethod
    def _compares(cls, value: str) -> str:
        if "loss" in value:
            raise ValueError(
                f"found {value!r}: losses of two temperatures, group sizes or loss types are on different scales, and "
                "the lower is not the better model; allowed: ndcg@10, recall@100, mrr@10, ..."
            )
        if not METRIC.fullmatch(value):
            raise ValueError(f"found {value!r}, must be ndcg, map, recall, precision or mrr at a number, as in ndcg@10")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        try:
            dimensions = parse_space(self.space)
        except ValueError as error:
            raise ValueError(f"tune.space: {error}") from None
        ranges = [dimension for dimension in dimensions if dimension.kind != "choice"]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"tune.search is grid, and tune.space has a {ranges[0].kind} for {ranges[0].key}; list its values "
                "(choice), or set tune.search to random or optuna"
            )
        return self

    def dimensions(self) -> tuple[Dimension, ...]:
        """The space, parsed."""
        return parse_space(self.space)
