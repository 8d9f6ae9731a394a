"""torch.compile of a backbone, one layer at a time: all layers share what is compiled for the first one.

Lengths are symbols, so that batches of other lengths compile nothing anew. Of packed texts, attention stays outside:
their lengths are numbers on the host, which would be compiled in. Dropout draws torch's own masks, in the order of the
model that is not compiled: a graph without gradient then draws what one with gradient does, as GradCache needs.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from torch import nn

from rayembed.config.train import TrainConfig
from rayembed.models.decoders import plain

OPTIONS: dict[str, str | int | bool | Any] = {"fallback_random": True}
_OFF = "or set train.torch_compile to false"


def check_compile(train: TrainConfig, stage: int) -> None:
    """Refuses train.torch_compile where it cannot work.

    Args:
        train: its field torch_compile says whether anything is compiled.
        stage: of ZeRO.

    Raises:
        ValueError: ZeRO 3.
        FileNotFoundError: there is no C++ compiler, or it would not find Python's headers.
    """
    if not train.torch_compile:
        return
    if stage == 3:
        raise ValueError(
            "train.torch_compile needs ZeRO stage 0, 1 or 2, and train.deepspeed says 3, which gathers weights in "
            f"hooks that break up what is compiled; set zero_optimization.stage to 2, {_OFF}"
        )
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(
            f"train.torch_compile needs a C++ compiler, and there is no {compiler}; install it (apt install g++), name "
            f"another one in the environment variable CXX, {_OFF}"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise FileNotFoundError(
            f"train.torch_compile needs the headers of Python, and there is no {header}; install them (apt install "
            f"python3-dev), {_OFF}"
        )


def compile_layers(model: nn.Module, train: TrainConfig, *, backend: str = "inductor") -> None:
    """Compiles the layers of a model's backbone in place, at their first call; does nothing where it is not wished for.

    Names of weights stay as they are.

    Args:
        model: with a `backbone`, prepared for training, on its device.
        train: its fields torch_compile and gradient_checkpointing.
        backend: of torch.compile.

    Raises:
        ValueError: the backbone has no layers.
    """
    if not train.torch_compile:
        return
    backbone: Any = plain(model.backbone)
    parts = _layers(backbone)
    if not parts:
        raise ValueError(f"train.torch_compile: {type(backbone).__name__} has no list of layers; set it to false")
    if train.gradient_checkpointing:  # which a layer does by itself, and which no graph with a break may hold
        parts = [part for layer in parts for part in layer.children()]
    for part in parts:
        part.compile(dynamic=True, backend=backend, options=OPTIONS if backend == "inductor" else None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """What the outermost lists of modules hold."""
    if isinstance(module, nn.ModuleList):
        return [*module]
    return [layer for child in module.children() for layer in _layers(child)]
