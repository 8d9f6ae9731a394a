"""Training steps and encoding for `gpu`: ours packed, in our engine, and sentence-transformers' on the same texts.

Each is alone on the device while it is measured, so that the peak of memory is its own. Texts are tokenised and lie in
batches before the clock starts, in training; in encoding the clock runs from texts to vectors on the host, in both.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.losses import info_nce
from rayembed.models.chunks import TokenBatch, pack_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import autocast, resolve_tokens_per_batch, tokenize
from rayembed.models.encoding import encode as encode_padded
from rayembed.models.loading import load_embedder, prepare_for_training
from rayembed.models.packable import why_not_packed
from rayembed.training.allocation import keep_freed_memory
from rayembed.training.compiling import compile_layers
from rayembed.training.engine import Engine
from rayembed.training.grad_cache import cached_backward
from tests.benchmarks.gpu_models import Texts, as_text

TEMPERATURE, WARM_UP = 0.02, 2
Step = Callable[[], float]
"""Does it and gives the loss, or another number of its result."""


@dataclass(frozen=True)
class Timed:
    """A step's figures."""

    seconds: float
    """Median."""

    peak_bytes: int | None
    """On the device; None on a CPU."""

    first: float
    """What the step gave first."""


def without_peer() -> bool:
    """Whether sentence-transformers is missing, or older than 6, whose modules lie elsewhere."""
    try:
        return int(version("sentence-transformers").split(".")[0]) < 6
    except PackageNotFoundError:
        return True


def rows_for(texts: Texts) -> Tensor:
    """Where each query's positive is."""
    return torch.arange(len(texts.queries)) * 2


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """One of one worker, where there is none yet: DeepSpeed wants it."""
    if dist.is_initialized():
        yield
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        keep_freed_memory()
    with TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        yield


def timed(step: Step, device: torch.device, rounds: int) -> Timed:
    """Median of `rounds` steps, after some that warm up."""
    first = step()
    for _ in range(WARM_UP - 1):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timed(statistics.median(seconds), peak, first)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Gives back what the last contestant held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def matmul_rate(device: torch.device, *, small: bool) -> float:
    """Operations a second of a bf16 matrix product, the best of twenty."""
    size = 512 if small else 8192 if device.type == "cuda" else 2048
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        left @ left
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def packed_model(config: ModelConfig, device: torch.device, *, training: bool) -> Embedder:
    """The model, that reads packed texts.

    Raises:
        RuntimeError: it cannot.
    """
    model = load_embedder(config).to(device)
    if training:
        prepare_for_training(model, family=config.family, fix_position_embedding=False, gradient_checkpointing=False)
    reason = why_not_packed(model, training=training)
    if reason is not None:
        raise RuntimeError(f"texts cannot be packed: {reason}")
    return model


def engine_for(config: ModelConfig, device: torch.device, **train: Any) -> Engine:  # noqa: ANN401 - settings
    """The model in our engine, ZeRO 0."""
    setup = Experiment(output_dir="unused", model=config, train=TrainConfig(lr_scheduler_type="constant", **train))
    assert setup.train is not None
    model = packed_model(config, device, training=True)
    compile_layers(model, setup.train)
    return Engine(model, setup.train, deepspeed_settings(setup), total_steps=1000, device=device)


def packed(texts: Texts, device: torch.device, tokens_per_chunk: int | None = None) -> tuple[TokenBatch, ...]:
    sides = (texts.queries, texts.passages)
    return tuple(pack_chunks(side, tokens_per_chunk=tokens_per_chunk).to(device) for side in sides)


def loss_of(outputs: Sequence[Tensor], positives: Tensor) -> Tensor:
    queries, passages = outputs
    return info_nce(queries @ passages.T, positives, temperature=TEMPERATURE)


def backward(engine: Engine, batches: Sequence[TokenBatch], positives: Tensor, *, cached: bool = False) -> Tensor:
    """The loss, whose gradient is on its way to the weights."""
    if cached:
        return cached_backward(engine, batches, lambda outputs: loss_of(outputs, positives))
    loss = loss_of(engine(batches), positives)
    engine.backward(loss)
    return loss.detach()


def our_step(engine: Engine, texts: Texts, device: torch.device, *, tokens_per_chunk: int | None = None) -> Step:
    """Of the plain step, or of GradCache's where chunks have a size."""
    batches, positives = packed(texts, device, tokens_per_chunk), rows_for(texts).to(device)

    def step() -> float:
        loss = backward(engine, batches, positives, cached=tokens_per_chunk is not None)
        engine.step()
        return float(loss)

    return step


def sentence_transformer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """The same weights in sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer import modules

    transformer = Transformer(config.name_or_path, model_kwargs={"dtype": dtype}, max_seq_length=512)
    mode = {"last_token": "lasttoken"}.get(str(config.pooling), str(config.pooling))
    width = int(transformer.auto_model.config.hidden_size)
    return SentenceTransformer(
        modules=[transformer, modules.Pooling(width, pooling_mode=mode), Normalize()], device=str(device)
    )


def their_step(config: ModelConfig, texts: Texts, device: torch.device) -> Step:
    """MultipleNegativesRankingLoss in bf16 autocast, clipping, fused AdamW: what their trainer does in a step."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = sentence_transformer(config, device, torch.float32).train()
    model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)  # as accelerate does
    loss_function = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    sides = (texts.queries, texts.passages[::2], texts.passages[1::2])
    columns = [[as_text(ids) for ids in side] for side in sides]
    features = [
        {key: own.to(device) if isinstance(own, Tensor) else own for key, own in model.preprocess(column).items()}
        for column in columns
    ]

    def step() -> float:
        loss = loss_function([dict(own) for own in features], None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def our_encoding(config: ModelConfig, ids: Sequence[Sequence[int]], device: torch.device, *, pack: bool) -> Step:
    """Packed, or padded as the jobs encode; weights are float32, the arithmetic is bf16."""
    model = packed_model(config, device, training=False)
    tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
    words, limit = [as_text(text) for text in ids], resolve_tokens_per_batch(None, device)

    @torch.inference_mode()
    def step() -> float:
        if not pack:
            told: dict[str, Any] = {"max_len": 512, "tokens_per_batch": limit, "dtype": torch.bfloat16}
            return float(encode_padded(model, tokenizer, words, **told)[:, 0].sum())
        batch = pack_chunks(tokenize(tokenizer, words, 512), tokens_per_chunk=limit).to(device)
        with autocast(torch.bfloat16, device):
            return float(model.embed(batch).cpu()[:, 0].sum())

    return step


def their_encoding(config: ModelConfig, ids: Sequence[Sequence[int]], device: torch.device) -> Step:
    """Their `encode`, with weights in bf16, which is what makes it fast."""
    model, words = sentence_transformer(config, device, torch.bfloat16), [as_text(text) for text in ids]

    def step() -> float:
        vectors = model.encode(words, batch_size=128, convert_to_tensor=True, show_progress_bar=False)
        return float(F.normalize(vectors.float(), dim=-1).cpu()[:, 0].sum())

    return step


def or_out_of_memory(measure: Callable[[], Timed], device: torch.device) -> Timed | None:
    """None where the device has too little memory."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None
    finally:
        free(device)
