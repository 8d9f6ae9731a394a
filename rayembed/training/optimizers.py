"""AdamW: torch's own, or that of bitsandbytes with moments in 8 bits."""

from typing import Any

import torch
from torch import nn

from rayembed.config.train import TrainConfig
from rayembed.models.adapters import check_bitsandbytes

BLOCK = 4096  # values; bitsandbytes keeps moments of smaller tensors in 32 bits


def adamw(model: nn.Module, train: TrainConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimiser of train.optim, for what is trained of a model.

    Args:
        model: on any device.
        train: kind, learning rate, decays.
        fused: all parameters in one kernel; of torch's AdamW alone.
    """
    groups = parameter_groups(model, train.weight_decay)
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optim == "adamw_bnb_8bit":
        return _bitsandbytes().AdamW8bit(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon, fused=fused)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: biases and normalisation weights (one-dimensional) get no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_optimizer(train: TrainConfig, zero: dict[str, Any], *, use_gpu: bool, elastic: bool) -> None:
    """Refuses an optimiser that could not take a step here, or not go on where the number of workers changes.

    Args:
        train: its field optim.
        zero: section zero_optimization of DeepSpeed's settings.
        use_gpu: workers have one.
        elastic: the number of workers may change.

    Raises:
        ModuleNotFoundError: bitsandbytes is not there and needed.
        ValueError: says which setting to change.
    """
    if train.optim != "adamw_bnb_8bit":
        return
    check_bitsandbytes("train.optim: adamw_bnb_8bit", "adamw_torch")
    if elastic and zero["stage"]:
        raise ValueError(
            "train.optim: adamw_bnb_8bit scales moments by the block, and ZeRO's blocks cannot be cut for another "
            "number of workers; set ray.num_workers to one number, zero_optimization.stage to 0, or train.optim to "
            "adamw_torch"
        )
    if not use_gpu or zero.get("offload_optimizer", {}).get("device", "none") == "cpu":
        _try_on_cpu()


def _try_on_cpu() -> None:
    parameter = nn.Parameter(torch.zeros(BLOCK))
    parameter.grad = torch.ones(BLOCK)
    try:
        _bitsandbytes().AdamW8bit([parameter], lr=1.0).step()
    except Exception as error:  # whatever a release without that kernel raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"train.optim: adamw_bnb_8bit takes no step on a CPU with the bitsandbytes that is installed ({reason}); "
            "pip install 'bitsandbytes>=0.50', train on a GPU without offloading, or set it to adamw_torch"
        ) from error


def _bitsandbytes() -> Any:  # noqa: ANN401 - a module without types
    from bitsandbytes import optim  # a second, which other optimisers do without

    return optim
