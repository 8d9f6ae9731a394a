"""What a pass over texts or a training will take, for --dry-run: arithmetic by counting, speed by a short measurement.

Counted: two operations a weight and token forwards, twice that backwards. The weights of embedding tables multiply
nothing. Measured: this machine's matrix product; models here reach about 40 % of it (MiniLM, 2 CPU cores), so an
estimate is good to a factor of about two, and for the machine that asks, not for the cluster that will run it.
"""

import time
from dataclasses import dataclass

import torch
from transformers import AutoModel

from rayembed.config.model import ModelConfig
from rayembed.models.encoding import resolve_dtype
from rayembed.models.loading import load_config

SHARE_OF_PEAK = 0.4
BYTES_A_TOKEN_LAYER = 40  # activations kept for the backward pass, in units of hidden size, 16 and 32 bits mixed


@dataclass(frozen=True)
class Shape:
    """Size of a model."""

    parameters: int
    multiplied: int
    """Parameters that take part in matrix products: all but embedding tables."""

    layers: int
    hidden: int


@dataclass(frozen=True)
class Cost:
    """Time of all workers together, and memory of one."""

    seconds: float
    bytes_a_worker: float


def shape_of(config: ModelConfig) -> Shape:
    """Counts parameters without loading weights."""
    settings = load_config(config.name_or_path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = AutoModel.from_config(  # type: ignore[no-untyped-call] # transformers types it not
            settings, trust_remote_code=config.trust_remote_code
        )
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    total = sum(parameter.numel() for parameter in model.parameters())
    return Shape(total, total - tables, int(settings.num_hidden_layers), int(settings.hidden_size))


def operations_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions of a matrix product, measured for about a quarter of a second."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.randn(size, size, device=device, dtype=dtype)
    (left @ left).sum().item()
    start, rounds = time.monotonic(), 0
    while time.monotonic() - start < 0.25:
        (left @ left).sum().item()
        rounds += 1
    return 2 * size**3 * rounds / (time.monotonic() - start)


def encoding_cost(config: ModelConfig, *, tokens: float, dtype: str, use_gpu: bool, tokens_per_batch: int) -> Cost:
    """Of encoding `tokens` tokens in all."""
    shape, device = shape_of(config), torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
    rate = SHARE_OF_PEAK * operations_per_second(resolve_dtype(dtype, device), device)
    activations = tokens_per_batch * shape.hidden * BYTES_A_TOKEN_LAYER
    return Cost(2 * shape.multiplied * tokens / rate, 4 * shape.parameters + activations)


def training_cost(
    config: ModelConfig,
    *,
    tokens: float,
    tokens_a_worker_batch: float,
    bf16: bool,
    checkpointing: bool,
    zero_stage: int,
    num_workers: int,
    use_gpu: bool,
    grad_cache: bool = False,
) -> Cost:
    """Of training on `tokens` tokens in all.

    Args:
        config: the model.
        tokens: over all steps and workers.
        tokens_a_worker_batch: whose activations are kept at once.
        bf16: bfloat16 arithmetic.
        checkpointing: activations of one layer at a time, one more forward pass.
        zero_stage: what is spread over the workers: optimiser (1), gradients (2), weights (3).
        num_workers: workers.
        use_gpu: measure on a GPU if there is one here.
        grad_cache: one more forward pass, and gradients are not spread.
    """
    shape, device = shape_of(config), torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
    rate = SHARE_OF_PEAK * operations_per_second(torch.bfloat16 if bf16 else torch.float32, device)
    passes = 3 + checkpointing + grad_cache
    weights, gradients, optimizer = (
        4 * count * shape.parameters / (num_workers if zero_stage >= stage else 1)
        for count, stage in ((1, 3), (1, 4 if grad_cache else 2), (2, 1))
    )
    layers = 2 if checkpointing else shape.layers
    activations = tokens_a_worker_batch * layers * shape.hidden * BYTES_A_TOKEN_LAYER
    return Cost(2 * passes * shape.multiplied * tokens / rate, weights + gradients + optimizer + activations)
