"""The DeepSpeed engine: the only file that imports deepspeed."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayembed.config.train import TrainConfig
from rayembed.training.checkpoints import FOLDER, Flat, Piece, Saved
from rayembed.training.optimizers import adamw
from rayembed.training.schedule import schedule

if not torch.cuda.is_available():  # silences DeepSpeed's guess; on a GPU machine it must stay unset
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

if not torch.cuda.is_available():
    # An operator that DeepSpeed would compile for 40 s at its first use on a CPU, and that gloo makes unnecessary.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# What DeepSpeed's checkpoints hold beside tensors. It loads them by pickle (weights_only=False), which would run any
# program that someone put there: so they are read by torch first, which knows no class but these.
torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


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
        stage = settings["zero_optimization"]["stage"]
        optimizer = adamw(model, train, fused=stage == 0)
        self.stage: int = stage
        if train.bf16:  # inside the model: on a GPU, DeepSpeed turns an autocast around its engine off
            model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, train, total_steps=total_steps),
            config=settings,
            dist_init_required=False if dist.is_initialized() else None,
        )
        self._grad_norm = float("nan")
        self._accumulation = train.gradient_accumulation_steps
        self._held, self._held_batches = ExitStack(), 0
        if train.grad_cache:
            self._check_holding()

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

    def hold(self) -> None:
        """Keeps gradients on the worker from here to the update, which reduces them once for all `backward` before.

        Called before the first `backward` of each batch, or never. Each worker holds a whole gradient then, also under
        ZeRO 2 and 3.
        """
        if not self._held_batches:
            # DeepSpeed wants one block an update, and its `step` outside of it, so that batches are counted here
            self._engine.set_gradient_accumulation_boundary(True)
            block = self._engine.coalesce_grad_reduction if self.stage else self._engine.no_sync
            self._held.enter_context(block())
        self._held_batches += 1

    def _check_holding(self) -> None:
        """Refuses DeepSpeed settings under which gradients cannot be held."""
        if not self._engine.managed_gradient_accumulation():
            raise ValueError("train.grad_cache needs managed_gradient_accumulation; remove it from train.deepspeed")
        if self.stage and not hasattr(self._engine.optimizer, "_coalesce_grad_reduction"):
            raise ValueError(
                f"train.grad_cache: DeepSpeed's {type(self._engine.optimizer).__name__} cannot reduce the gradients of "
                "several chunks at once; remove bf16 from train.deepspeed and set train.bf16: true, or set "
                "train.grad_cache: false"
            )

    def _release(self) -> None:
        """Reduces what was held."""
        self._held.close()
        self._held_batches = 0
        if self.stage == 0:
            self._engine.allreduce_gradients()

    def step(self) -> bool:
        """Ends a batch; at the last one of an accumulation, clips, updates and moves the schedule.

        Returns:
            Whether the weights were updated.
        """
        if self._held_batches:
            if self._held_batches < self._accumulation:
                return False
            self._release()
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
    def scales_loss(self) -> bool:
        """Whether losses are scaled (fp16), so that an update is left out where the gradient is too large."""
        return bool(self._engine.fp16_enabled())

    @property
    def grad_norm(self) -> float:
        """2-norm of the last update's gradient, before clipping."""
        return self._grad_norm

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._engine.get_lr()[0])

    def save(self, folder: Path, state: dict[str, Any]) -> None:
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
            self._engine.save_checkpoint(
                str(folder), tag=FOLDER, client_state={"progress": state}, exclude_frozen_parameters=True
            )
        finally:
            hook.remove()

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote, on any number of workers, and gives `state` back with the number as "workers".

        On the same number the run goes on bit by bit, on another one to the rounding of sums over workers.

        Raises:
            FileNotFoundError: the folder holds no checkpoint, or not all of it.
            ValueError: the checkpoint is of a model that trains other weights, of another ZeRO stage, or holds more
                than DeepSpeed writes.
        """
        saved = Saved(folder)
        saved.check_pickles()
        if self.stage and saved.num_workers != self._engine.seq_dp_world_size:
            state = self._load_from_others(saved)
        else:
            _, state = self._engine.load_checkpoint(str(folder), tag=FOLDER, custom_load_fn=_load_trained)
        return {**state["progress"], "workers": saved.num_workers}

    def _load_from_others(self, saved: Saved) -> dict[str, Any]:
        """DeepSpeed's own loading, but that this worker's share of the optimiser is cut from those of all."""
        engine, optimizer, found = self._engine, self._engine.optimizer, saved.model
        layout = self._layout_of_stage_3() if self.stage == 3 else self._layout_of_stages_1_and_2(saved)
        groups = [*range(len(layout))]
        if self.stage == 3:
            groups = [optimizer.sub_group_to_group_id[number] for number in groups]
            optimizer.checkpoint_event_prologue()
            buffers = {name for name, _ in self.module.named_buffers()}
            kept = {name: value for name, value in found["module"].items() if name in buffers}
            self.module.load_state_dict(kept, strict=False)
        else:
            _load_trained(found["module"], self.module)
        optimizer.load_state_dict(
            {dist.get_rank(): saved.share_of(layout, groups)}, load_optimizer_states=True, load_from_fp32_weights=True
        )
        if self.stage == 3:
            optimizer.checkpoint_event_epilogue()
        engine.lr_scheduler.load_state_dict(found["lr_scheduler"])
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, found[name])
        return found

    def _layout_of_stages_1_and_2(self, saved: Saved) -> list[Flat]:
        """What this worker's flat tensors are made of."""
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "single_partition_of_fp32_groups"):
            raise ValueError(
                f"{type(optimizer).__name__} of DeepSpeed goes on with a checkpoint on as many workers alone; set "
                f"ray.num_workers to {saved.num_workers}"
            )
        flats = []
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            pieces = []
            for parameter in group:
                place = parameter._hp_mapping
                if place is not None:  # else all of it lies with other workers
                    own, start = place.lp_fragment_address, place.hp_fragment_address.start
                    pieces.append(Piece(self._engine.param_names[parameter], own.start, own.numel, start))
            flats.append(Flat(flat.numel(), tuple(pieces)))
        return flats

    def _layout_of_stage_3(self) -> list[Flat]:
        """What this worker's flat tensors are made of."""
        rank, workers, flats = dist.get_rank(), dist.get_world_size(), []
        for group in self._engine.optimizer.fp16_groups:
            pieces, offset = [], 0
            for parameter in group:
                part = -(-parameter.ds_numel // workers)
                own = min(part, max(0, parameter.ds_numel - rank * part))
                pieces.append(Piece(self._engine.param_names[parameter], rank * part, own, offset))
                offset += part
            flats.append(Flat(offset, tuple(pieces)))
        return flats

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
