"""The DeepSpeed settings that a worker gets: the user's file, with what the experiment decides filled in."""

import copy
import json
from pathlib import Path
from typing import Any

from rayembed.config.experiment import Experiment

MICRO_BATCH = "train_micro_batch_size_per_gpu"


def deepspeed_settings(experiment: Experiment, *, workers: int | None = None) -> dict[str, Any]:
    """The settings for `deepspeed.initialize`.

    "auto" values and missing ones come from the experiment. `optimizer` and `scheduler` sections are accepted when all
    their parameters are "auto" (as in FlagEmbedding's files), because the experiment's own settings are used.

    Args:
        experiment: its `train` section is there.
        workers: how many train now. None: the fewest of ray.num_workers.

    Raises:
        ValueError: the file is not there or not JSON, or says something else than the experiment.
    """
    train = experiment.train
    assert train is not None
    settings = _read(train.deepspeed)
    for section in ("optimizer", "scheduler"):
        fixed = [key for key, value in settings.pop(section, {}).get("params", {}).items() if value != "auto"]
        if fixed:
            raise ValueError(
                f"train.deepspeed: {section}.params sets {', '.join(fixed)}; write them under train (learning_rate, "
                f"weight_decay, warmup_ratio, ...) and remove the {section} section"
            )
    decided = {
        MICRO_BATCH: experiment.global_batch_size() // (workers or experiment.ray.fewest_workers),
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": experiment.global_batch_size() * train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,  # DeepSpeed clips at 1.0 when nothing is said
    }
    for key, value in decided.items():
        found = settings.get(key, "auto")
        if found not in ("auto", value):
            raise ValueError(f"train.deepspeed: {key} is {found}, but the experiment makes it {value}; write auto")
        settings[key] = value
    for section, flag in (("fp16", train.fp16), ("bf16", None)):
        given = settings.get(section, {})
        if given.get("enabled") == "auto":
            settings[section] = {**given, "enabled": bool(flag)}
    if train.fp16:
        settings["fp16"] = {**settings.get("fp16", {}), "enabled": True}
    if train.bf16 and settings.get("bf16", {}).get("enabled"):
        raise ValueError(
            "train.bf16 (autocast over float32 weights) and DeepSpeed's bf16.enabled are both on; keep one of them"
        )
    stage = settings.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"train.deepspeed: zero_optimization.stage is {stage!r}; 0, 1, 2 and 3 are allowed")
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def _read(source: str | dict[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, dict):
        return copy.deepcopy(source)  # it is changed below
    try:
        settings = json.loads(Path(source).read_text())
    except FileNotFoundError:
        raise ValueError(f"train.deepspeed: no file {source!r}; see configs/deepspeed/") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"train.deepspeed: {source}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"train.deepspeed: {source} holds a {type(settings).__name__}, not an object")
    return settings
