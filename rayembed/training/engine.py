"""The DeepSpeed engine: the only file that imports deepspeed."""

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import get_scheduler

from rayembed.config.train import TrainConfig

if not torch.cuda.is_available():  # silences DeepSpeed's guess; on a GPU machine it must stay unset
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops

if not torch.cuda.is_available():
    # An operator that DeepSpeed would compile for 40 s at its first use on a CPU, and that gloo makes unnecessary.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """A model in a DeepSpeed engine, with its optimiser and schedule."""

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: dict[str, Any],
        *,
        total_steps: int,
        device: torch.device,
    ) -> None:
        """Wraps the model.

        Args:
            model: with float32 weights; parameters that require no gradient stay as they are.
            train: optimiser and schedule.
            settings: from `config.deepspeed.deepspeed_settings`.
            total_steps: steps of the optimiser, for the schedule.
            device: of this worker.
        """
        optimizer = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused=device.type == "cuda" and settings["zero_optimization"]["stage"] == 0,
        )
        warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total_steps)
        scheduler = get_scheduler(
            train.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
        )
        self.stage: int = settings["zero_optimization"]["stage"]
        if train.bf16:  # inside the model: on a GPU, DeepSpeed turns an autocast around its engine off
            model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=settings,
            dist_init_required=False if dist.is_initialized() else None,
        )
        self._grad_norm = float("nan")

    @property
    def module(self) -> nn.Module:
        """The model inside; under ZeRO 3 its weights are spread over the workers."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *inputs: object) -> Any:  # noqa: ANN401 - whatever the model gives
        """The model's forward pass, in bfloat16 under train.bf16."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss divided by gradient_accumulation_steps, averaged over workers."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """Ends a batch; at the last one of an accumulation, clips, updates and moves the schedule.

        Returns:
            Whether the weights were updated.
        """
        updated = bool(self._engine.is_gradient_accumulation_boundary())
        if updated and self._has_plain_optimizer():
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._grad_norm = float(torch.stack(torch._foreach_norm(grads)).norm()) if grads else 0.0
        self._engine.step()
        if updated and not self._has_plain_optimizer():
            self._grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        return updated

    def _has_plain_optimizer(self) -> bool:
        """ZeRO 0 in float32: torch's own optimiser, for which DeepSpeed gives no gradient norm."""
        return not hasattr(self._engine.optimizer, "_global_grad_norm")

    @property
    def grad_norm(self) -> float:
        """2-norm of the last update's gradient, before clipping."""
        return self._grad_norm

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._engine.get_lr()[0])

    def save(self, folder: Path, state: dict[str, int]) -> None:
        """Writes this worker's share of trained weights, optimiser and schedule, and `state`. All workers call it.

        Frozen weights are left out: whoever goes on builds the same model.
        """
        kept = {name for name, _ in self.module.named_buffers()}
        kept |= {name for name, found in self.module.named_parameters(remove_duplicate=False) if found.requires_grad}

        def leave_out(_module: nn.Module, found: dict[str, Any], _prefix: str, _metadata: dict[str, Any]) -> None:
            # DeepSpeed leaves out the first name of a frozen weight, but not the second one of a tied weight, nor what
            # bitsandbytes keeps of a weight in 4 bits under names of its own.
            for name in found.keys() - kept:
                del found[name]

        hook = self.module.register_state_dict_post_hook(leave_out)  # type: ignore[no-untyped-call]
        try:
            self._engine.save_checkpoint(str(folder), tag="state", client_state=state, exclude_frozen_parameters=True)
        finally:
            hook.remove()

    def load(self, folder: Path) -> dict[str, int]:
        """Restores what `save` wrote, on the same number of workers, and gives `state` back.

        Raises:
            FileNotFoundError: the folder holds no checkpoint.
            ValueError: the checkpoint is of a model that trains other weights.
        """
        if not (folder / "state").is_dir():
            raise FileNotFoundError(f"{folder} holds no DeepSpeed checkpoint (no folder state)")
        _, state = self._engine.load_checkpoint(str(folder), tag="state", custom_load_fn=_load_trained)
        return dict(state)

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each trained parameter, one whole parameter after the other, also under ZeRO 3.

        All workers go through all of them; a value is gone when the next one comes.
        """
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                with nullcontext() if self.stage != 3 else deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach()


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Puts weights of a checkpoint into the model, whose frozen weights are those it was built with."""
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    there = {name for name, _ in [*dst.named_parameters(remove_duplicate=False), *dst.named_buffers()]}
    missing, unexpected = sorted(trained - src.keys()), sorted(src.keys() - there)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint is of another model: it lacks {len(missing)} weights {missing[:3]} and has "
            f"{len(unexpected)} others {unexpected[:3]}; set the settings back, or train anew with --overwrite"
        )
    dst.load_state_dict(src, strict=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: biases and normalisation weights (one-dimensional) get no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
