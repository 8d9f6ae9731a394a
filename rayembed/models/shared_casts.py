"""Layers that read the same rows, as query, key and value do, read one copy of them in half precision.

Autocast makes a copy for each, and holds all of them until the backward pass, where it turns each one's gradient to
float32 before they are added. Here the gradients are added first, in half precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

SIDE_BY_SIDE = ({"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Names of layers in one module that are all called with what the module is called with."""


def share_casts(model: nn.Module) -> None:
    """Lets a model's attention, and feed-forward parts with a gate, turn their input to half precision once.

    Nothing changes where there is no autocast.
    """
    for module in model.modules():
        names = {name for name, _ in module.named_children()}
        adds_its_input = any(isinstance(child, nn.LayerNorm) for child in module.children())  # ALBERT's: in float32
        if not adds_its_input and any(group <= names for group in SIDE_BY_SIDE):
            module.register_forward_pre_hook(_cast, with_kwargs=True)


def _cast(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
    rows = inputs[0] if inputs else named.get("hidden_states")
    if not isinstance(rows, Tensor) or rows.dtype != torch.float32 or not torch.is_autocast_enabled(rows.device.type):
        return None
    cast = rows.to(torch.get_autocast_dtype(rows.device.type))
    return ((cast, *inputs[1:]), named) if inputs else (inputs, named | {"hidden_states": cast})
