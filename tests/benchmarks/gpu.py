"""All that is to be measured on a CUDA GPU, by one command: make bench-gpu

Parts: `train` (a step of BERT-base, XLM-R-large and a 0.6B decoder, ours packed against sentence-transformers in bf16,
texts as long as MedQuAD's and all of 512 tokens), `encode` (the large model), `equal` (packed texts give the vectors
and gradients of padded ones, by the kernel of torch.nn.attention.varlen) and `options` (GradCache beside the plain
step, fused AdamW, torch.compile). Weights and tokens are random and dropout is 0. The exit status is 1 where `equal`
or GradCache's gradient fails, and 2 where the device is not there.

On a machine that has torch and transformers and not Ray, without `make venv`: ray is not imported here, and what else
is missing (deepspeed, pydantic, ...) comes in a folder.
    here:   ../shared/gpu/bundle.sh .gpu
    there:  source .gpu/activate && python3 -m tests.benchmarks.gpu
(`activate` sets PYTHONPATH; any other way to put the packages of pyproject.toml there does as well:
PYTHONPATH=SITE:. python3 -m tests.benchmarks.gpu). Without sentence-transformers its lines say so.

Tried on a CPU: python -m tests.benchmarks.gpu --device cpu --small
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rayembed.config.model import ModelConfig
from rayembed.models.chunks import TokenBatch, pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import autocast
from rayembed.models.loading import load_embedder, prepare_for_training
from tests.benchmarks import gpu_models, gpu_steps
from tests.benchmarks.gpu_models import KINDS, LARGE, Texts
from tests.benchmarks.gpu_steps import Timed

FIXED = {"as MedQuAD": None, "all 512": 512}
OURS, PEER, PADDED = "ours packed", "sentence-transformers", "ours padded"
GOALS = {"train": 0.45, "encode": 0.6}  # share of the matmul rate, of the large model
FASTER = 2.0  # than sentence-transformers in training, on texts as MedQuAD's
GRADIENT_APART = 1e-4  # of GradCache, as a share of the plain gradient's length
EQUAL = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 1e-1)}
"""How far packed may be from padded: vectors at most, and the gradient as a share of its length."""


@dataclass(frozen=True)
class Bench:
    """What all parts are told."""

    device: torch.device
    small: bool
    tokens: int
    """Real ones of a training step."""

    rounds: int
    folder: Path
    matmul_rate: float
    compile: bool

    def model(self, name: str) -> ModelConfig:
        """A model of KINDS, or in its small form of ARCHITECTURES (by "small " and its name); made once."""
        small, kind = name.startswith("small "), gpu_models.ARCHITECTURES[name.removeprefix("small ")]
        folder = self.folder / name.replace(" ", "-")
        if not folder.exists():
            gpu_models.made(folder, kind, small=small or self.small)
        return kind.model(folder)

    def texts(self, config: ModelConfig, fixed: int | None, *, times: int = 1) -> Texts:
        return gpu_models.texts(Path(config.name_or_path), tokens=times * self.tokens, fixed=fixed)


def part_train(bench: Bench) -> tuple[list[str], bool]:
    """A training step of each model."""
    lines = [_header("model", "texts")]
    for name in KINDS:
        config = bench.model(name)
        for lengths, fixed in FIXED.items():
            texts = bench.texts(config, fixed)
            work = _operations(config, texts.all, training=True)

            def ours(config: ModelConfig = config, texts: Texts = texts) -> Timed:
                engine = gpu_steps.engine_for(config, bench.device, bf16=True)
                return gpu_steps.timed(gpu_steps.our_step(engine, texts, bench.device), bench.device, bench.rounds)

            def theirs(config: ModelConfig = config, texts: Texts = texts) -> Timed:
                step = gpu_steps.their_step(config, texts, bench.device)
                return gpu_steps.timed(step, bench.device, bench.rounds)

            found = _measured(bench, {OURS: ours, PEER: theirs})
            lines += _rows(bench, (name, lengths), found, tokens=sum(map(len, texts.all)), work=work)
            own, peer = found[OURS], found[PEER]
            if own is not None and peer is not None and fixed is None:
                lines.append(_goal(f"{name}: times as fast as {PEER}", peer.seconds / own.seconds, FASTER))
            if own is not None and name == LARGE:
                share = work / own.seconds / bench.matmul_rate
                lines.append(_goal(f"{name}, {lengths}: share of the matmul rate", share, GOALS["train"]))
    return lines, True


def part_encode(bench: Bench) -> tuple[list[str], bool]:
    """Encoding with the large model, from texts to vectors on the host."""
    lines, config = [_header("model", "texts")], bench.model(LARGE)
    for lengths, fixed in FIXED.items():
        ids = bench.texts(config, fixed, times=1 if bench.small else 8).passages
        work = _operations(config, ids, training=False)

        def encoding(pack: bool, ids: list[list[int]] = ids) -> Timed:
            step = gpu_steps.our_encoding(config, ids, bench.device, pack=pack)
            return gpu_steps.timed(step, bench.device, bench.rounds)

        def theirs(ids: list[list[int]] = ids) -> Timed:
            step = gpu_steps.their_encoding(config, ids, bench.device)
            return gpu_steps.timed(step, bench.device, bench.rounds)

        ways: dict[str, Callable[[], Timed]] = {
            OURS: partial(encoding, True),
            PADDED: partial(encoding, False),
            PEER: theirs,
        }
        found = _measured(bench, ways)
        lines += _rows(bench, (LARGE, lengths), found, tokens=sum(map(len, ids)), work=work)
        own = found[OURS]
        if own is not None:
            share = work / own.seconds / bench.matmul_rate
            lines.append(_goal(f"{LARGE}, {lengths}: share of the matmul rate", share, GOALS["encode"]))
    return lines, True


def part_equal(bench: Bench) -> tuple[list[str], bool]:
    """Small models of each architecture: packed texts give what padded ones give."""
    lines, fine = ["model | arithmetic | vectors apart | gradient apart | allowed"], True
    for name in gpu_models.ARCHITECTURES:
        config = bench.model(f"small {name}")
        texts = gpu_models.texts(Path(config.name_or_path), tokens=2000, fixed=None)
        positives = gpu_steps.rows_for(texts).to(bench.device)
        try:
            packed = gpu_steps.packed_model(config, bench.device, training=True)
        except RuntimeError as error:
            lines.append(f"{name} | FAILED: {error}")
            fine = False
            continue
        padded = load_embedder(config).to(bench.device)
        prepare_for_training(padded, family=config.family, fix_position_embedding=False, gradient_checkpointing=False)
        for dtype, (allowed, of_gradient) in EQUAL.items():
            batches = tuple(
                pad_chunks(side, pad_token=_pad_token(padded), padding_side="right").to(bench.device)
                for side in (texts.queries, texts.passages)
            )
            expected = _vectors_and_gradient(padded, batches, positives, dtype)
            found = _vectors_and_gradient(packed, gpu_steps.packed(texts, bench.device), positives, dtype)
            apart = float((found[0] - expected[0]).abs().max())
            relative = float((found[1] - expected[1]).norm() / expected[1].norm())
            well = apart <= allowed and relative <= of_gradient
            fine = fine and well
            verdict = "" if well else " FAILED"
            lines.append(f"{name} | {dtype} | {apart:.2g} | {relative:.2g} | {allowed}, {of_gradient}{verdict}")
    return lines, fine


def part_options(bench: Bench) -> tuple[list[str], bool]:
    """GradCache, fused AdamW and torch.compile, of BERT-base."""
    config, chunk = bench.model("BERT-base"), bench.tokens // 8
    texts = bench.texts(config, None)
    gradients, found = {}, {}
    for cached in (False, True):
        told: dict[str, Any] = {"grad_cache": True, "tokens_per_chunk": chunk} if cached else {}
        engine = gpu_steps.engine_for(config, bench.device, **told)
        batches = gpu_steps.packed(texts, bench.device, chunk if cached else None)
        gpu_steps.backward(engine, batches, gpu_steps.rows_for(texts).to(bench.device), cached=cached)
        gradients[cached] = _gradient(engine.module)
        del engine, batches
        gpu_steps.free(bench.device)
        engine = gpu_steps.engine_for(config, bench.device, bf16=True, **told)
        step = gpu_steps.our_step(engine, texts, bench.device, tokens_per_chunk=chunk if cached else None)
        found[cached] = gpu_steps.timed(step, bench.device, bench.rounds)
        del engine, step
        gpu_steps.free(bench.device)
    relative = float((gradients[True] - gradients[False]).norm() / gradients[False].norm())
    plain, cached_step = found[False], found[True]
    lines = [
        f"GradCache, float32: gradient apart by {relative:.2g} of the plain one's length, allowed {GRADIENT_APART}",
        f"GradCache, bf16: {cached_step.seconds / plain.seconds:.2f} times the plain step, "
        f"{_memory(cached_step)} in place of {_memory(plain)}",
    ]
    lines += [*_optimizers(bench, config), _compiled(bench, config, texts, plain)]
    return lines, relative <= GRADIENT_APART


def _optimizers(bench: Bench, config: ModelConfig) -> list[str]:
    lines = []
    for fused in (False, True):
        model = load_embedder(config).to(bench.device)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.step()
            return 0.0

        found = gpu_steps.timed(step, bench.device, bench.rounds)
        lines.append(f"AdamW, {'fused' if fused else 'not fused'}: {1000 * found.seconds:.2f} ms")
    return lines


def _compiled(bench: Bench, config: ModelConfig, texts: Texts, plain: Timed) -> str:
    if not bench.compile:
        return "torch.compile: left out (--compile tries it in any case)"
    engine = gpu_steps.engine_for(config, bench.device, bf16=True, torch_compile=True)
    found = gpu_steps.timed(gpu_steps.our_step(engine, texts, bench.device), bench.device, bench.rounds)
    return (
        f"torch.compile, bf16: {1000 * found.seconds:.1f} ms a step, {1000 * plain.seconds:.1f} without; first losses "
        f"{found.first:.4f} and {plain.first:.4f}; {_memory(found)} in place of {_memory(plain)}"
    )


def _vectors_and_gradient(
    model: Embedder, batches: Sequence[TokenBatch], positives: Tensor, dtype: str
) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with autocast(getattr(torch, dtype), positives.device):
        outputs = model(batches)
    gpu_steps.loss_of(outputs, positives).backward()  # type: ignore[no-untyped-call]
    return torch.cat([own.detach() for own in outputs]), _gradient(model)


def _gradient(model: torch.nn.Module) -> Tensor:
    """All of it as one vector."""
    return torch.cat([own.grad.flatten().float() for own in model.parameters() if own.grad is not None])


def _pad_token(model: Embedder) -> int:
    config: Any = model.backbone.config
    return int(config.pad_token_id)


def _operations(config: ModelConfig, ids: Sequence[Sequence[int]], *, training: bool) -> float:
    return gpu_models.operations(load_embedder(config).backbone, ids, training=training)


def _measured(bench: Bench, ways: dict[str, Callable[[], Timed]]) -> dict[str, Timed | None]:
    """Each way alone on the device; None: there is no room, or nothing to measure."""
    return {
        name: None if name == PEER and gpu_steps.without_peer() else gpu_steps.or_out_of_memory(measure, bench.device)
        for name, measure in ways.items()
    }


def _header(*first: str) -> str:
    return " | ".join((*first, "by", "ms", "real tokens/s", "share of matmul", "peak memory", "first result"))


def _rows(
    bench: Bench, first: tuple[str, ...], found: dict[str, Timed | None], *, tokens: int, work: float
) -> list[str]:
    lines = []
    for name, own in found.items():
        if own is None:
            why = "not installed (6 or newer)" if name == PEER and gpu_steps.without_peer() else "out of memory"
            lines.append(" | ".join((*first, name, why)))
            continue
        share = work / own.seconds / bench.matmul_rate
        figures = (f"{1000 * own.seconds:.1f}", f"{tokens / own.seconds:,.0f}", f"{100 * share:.1f} %", _memory(own))
        lines.append(" | ".join((*first, name, *figures, f"{own.first:.4f}")))
    return lines


def _memory(found: Timed) -> str:
    return "-" if found.peak_bytes is None else f"{found.peak_bytes / 2**30:.2f} GiB"


def _goal(what: str, value: float, goal: float) -> str:
    return f"  {what}: {value:.2f}, goal {goal}: {'reached' if value >= goal else 'missed'}"


PARTS = {"train": part_train, "encode": part_encode, "equal": part_equal, "options": part_options}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="models of 2 layers and few texts")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--tokens", type=int, help="real tokens of a training step; 16384, with --small 512")
    parser.add_argument("--rounds", type=int, help="5, with --small 1")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; off with --small")
    parser.add_argument("--out", type=Path, help="JSON with every line")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: no CUDA GPU is to be seen by torch here; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    result: dict[str, list[str]] = {}
    well = True
    with TemporaryDirectory() as name, gpu_steps.process_group(device):
        bench = Bench(
            device=device,
            small=options.small,
            tokens=options.tokens or (512 if options.small else 16384),
            rounds=options.rounds or (1 if options.small else 5),
            folder=Path(name),
            matmul_rate=gpu_steps.matmul_rate(device, small=options.small),
            compile=not options.small if options.compile is None else options.compile,
        )
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        print(f"{what}, torch {torch.__version__}: {bench.matmul_rate / 1e12:.2f} bf16 TFLOP/s", flush=True)
        for part in options.parts:
            print(f"\n## {part}: {(PARTS[part].__doc__ or '').strip()}")
            lines, fine = PARTS[part](bench)
            print(*lines, sep="\n", flush=True)
            result[part], well = lines, well and fine
        told = {key: str(value) for key, value in asdict(bench).items()}
    if options.out is not None:
        options.out.write_text(json.dumps({"device": what, "told": told, **result}, indent=1) + "\n")
    if not well:
        print("\nFAILED: packed texts or GradCache do not give what they must; see above")
    return 0 if well else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads sometimes abort a process that used DeepSpeed and ends the long way
