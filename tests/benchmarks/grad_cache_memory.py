"""What GradCache saves and costs: memory of a large batch beside that of a small one, time beside the plain step.

Run: OMP_NUM_THREADS=2 PYTHONPATH=. python tests/benchmarks/grad_cache_memory.py
Each line of memory is a fresh process with a BERT of 2 layers and 128 dimensions (dropout 0.1), texts of 32 tokens, two
passages a query, ZeRO 0 on a CPU. Times are interleaved in one process, their median of 5.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from transformers import BertConfig, BertModel

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.models.chunks import TokenBatch, pad_chunks
from rayembed.models.dropout import use_quick_dropout
from rayembed.models.embedder import Embedder
from rayembed.training.batches import Batch
from rayembed.training.engine import Engine
from rayembed.training.grad_cache import cached_backward
from rayembed.training.objective import Objective
from tests.training.made_batches import different_keys, one_dataset, worker_batch

TOKENS, GROUP, VOCABULARY = 32, 2, 30522
ROUNDS = 5


def start(queries: int) -> tuple[Engine, Objective, Batch]:
    """The model in its engine and a batch, alone in a process group."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{TemporaryDirectory().name}", rank=0, world_size=1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    model = Embedder(BertModel(config, add_pooling_layer=False), pooling="mean", normalize=True).train()
    use_quick_dropout(model)  # as training does
    setup = Experiment(
        output_dir="unused",
        model=ModelConfig(name_or_path="none"),
        data=DataConfig(train_group_size=GROUP),
        train=TrainConfig(per_device_train_batch_size=queries, grad_cache=True),
    )
    assert setup.train is not None
    engine = Engine(model, setup.train, deepspeed_settings(setup), total_steps=100, device=torch.device("cpu"))

    def texts(count: int) -> TokenBatch:
        ids = torch.randint(1000, VOCABULARY, (count, TOKENS)).tolist()
        return pad_chunks(ids, pad_token=0, padding_side="right", tokens_per_chunk=setup.tokens_per_chunk())

    batch = worker_batch(different_keys(queries, GROUP), None, one_dataset(setup), 0, 1)
    batch = Batch((texts(queries), texts(queries * GROUP)), None, batch.keys, batch.dataset)
    return engine, Objective(setup), batch


def step(engine: Engine, objective: Objective, batch: Batch, *, cached: bool) -> float:
    """Seconds of one."""
    begin = time.monotonic()
    if cached:
        cached_backward(engine, batch.inputs, lambda outputs: objective(outputs, batch))
    else:
        engine.backward(objective(engine(batch.inputs), batch))
    engine.step()
    return time.monotonic() - begin


def peak(queries: int, cached: bool) -> str:
    """Of two steps, for the optimiser's state comes with the first."""
    made = start(queries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [step(*made, cached=cached) for _ in range(2)]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"peak {most / 1024:,.0f} MiB ({before / 1024:,.0f} before the first step), {min(seconds):.2f} s a step"


def times(queries: int) -> str:
    """Of both kinds of step, in turn."""
    made = start(queries)
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS + 1):
        for cached, own in found.items():
            seconds = step(*made, cached=cached)
            if number:  # the first one warms up
                own.append(seconds)
    plain, cached_ = (statistics.median(own) for own in found.values())
    return f"plain {plain:.2f} s, cached {cached_:.2f} s: {cached_ / plain:.2f} times"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, count = sys.argv[1], int(sys.argv[2])
        line = times(count) if kind == "times" else peak(count, kind == "cached")
        sys.stdout.write(line + "\n")
        sys.exit()
    for kind, count in (
        ("plain", 64),
        ("cached", 64),
        ("plain", 1024),
        ("cached", 1024),
        ("cached", 8192),
        ("times", 64),
        ("times", 512),
    ):
        command = [sys.executable, str(Path(__file__)), kind, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stdout.write(f"{kind:6} {count:5,} queries: {(done.stdout.splitlines() or [done.stderr])[-1]}\n")
        sys.stdout.flush()
