"""One contestant of `train_step` in a process of its own: for each line on stdin it does a training step.

It answers with a line of JSON: seconds from the line to the end of the step, loss, and the most memory it has held.
What a step is: from texts (peers, which tokenise in their collators) or token ids (ours, which tokenises ahead of
training) to the updated weights. Peers are driven through their own trainers, which a callback holds between steps.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import train_step_rows as rows_of


@dataclass(frozen=True)
class Told:
    """What a contestant is told, as JSON in its first argument."""

    name: str
    folder: str
    """Of the rows."""

    model: str
    scratch: str
    queries: int
    steps: int
    threads: int
    learning_rate: float

    @property
    def bf16(self) -> bool:
        return self.name.endswith("bf16")


class Turns:
    """Waits for a line, and answers; what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start = 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._start = time.perf_counter()

    def answer(self, loss: float) -> None:
        seconds = time.perf_counter() - self._start
        self._write({"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes()})

    def ready(self) -> None:
        self._write({"ready": True})

    def _write(self, found: dict[str, object]) -> None:
        self._answers.write(json.dumps(found) + "\n")
        self._answers.flush()


def peak_bytes() -> int:
    """The most that this process has held in memory so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def ours(told: Told, turns: Turns) -> None:
    """The pieces of rayembed.training.loop, in its order; each batch is built inside of its step."""
    import torch
    import torch.distributed as dist

    from rayembed.config.deepspeed import deepspeed_settings
    from rayembed.training.alarms import Judge
    from rayembed.training.allocation import keep_freed_memory
    from rayembed.training.engine import Engine
    from rayembed.training.loop import batch_source, trainable
    from rayembed.training.objective import Objective
    from rayembed.training.packed import reads_packed

    keep_freed_memory()
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{told.scratch}/group", rank=0, world_size=1)
    setup = rows_of.experiment(
        Path(told.model),
        queries=told.queries,
        steps=told.steps,
        learning_rate=told.learning_rate,
        bf16=told.bf16,
    )
    config, worker = setup.train, rows_of.worker(Path(told.folder))
    assert config is not None
    model = trainable(setup)
    source = replace(batch_source(setup, worker), packed=reads_packed(config, model, None))
    objective = Objective(setup)
    engine = Engine(model, config, deepspeed_settings(setup), total_steps=told.steps, device=worker.device)
    turns.ready()
    for number in range(told.steps):
        turns.wait()
        torch.manual_seed(number)
        batch = source.batch(number)
        loss = Judge(partial(objective, batch=batch, step=number))(engine(batch.inputs))
        engine.backward(loss)
        engine.step()
        turns.answer(loss.item())


def flag_embedding(told: Told, turns: Turns) -> None:
    """FlagEmbedding's runner; only the order of rows and what is done with the loss differ."""
    from FlagEmbedding.abc.finetune.embedder import (
        AbsEmbedderDataArguments,
        AbsEmbedderModelArguments,
        AbsEmbedderTrainingArguments,
    )
    from FlagEmbedding.finetune.embedder.encoder_only.base import EncoderOnlyEmbedderRunner, EncoderOnlyEmbedderTrainer
    from torch.utils.data import SequentialSampler

    class Trainer(EncoderOnlyEmbedderTrainer):  # type: ignore[misc] # untyped
        def _get_train_sampler(self, *_: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Runner(EncoderOnlyEmbedderRunner):  # type: ignore[misc] # untyped
        def load_trainer(self) -> Trainer:
            return Trainer(
                model=self.model,
                args=self.training_args,
                train_dataset=self.train_dataset,
                data_collator=self.data_collator,
                processing_class=self.tokenizer,
            )

    runner = Runner(
        model_args=AbsEmbedderModelArguments(model_name_or_path=told.model),
        data_args=AbsEmbedderDataArguments(
            train_data=[f"{told.folder}/rows.jsonl"],
            cache_path=f"{told.scratch}/cache",
            query_max_len=rows_of.QUERY_MAX_LEN,
            passage_max_len=rows_of.PASSAGE_MAX_LEN,
            train_group_size=rows_of.GROUP,
        ),
        training_args=AbsEmbedderTrainingArguments(
            temperature=rows_of.TEMPERATURE,
            sentence_pooling_method="mean",
            **_arguments(told),
        ),
    )
    _in_turns(runner.trainer, turns)


def sentence_transformers(told: Told, turns: Turns) -> None:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss; only the order of rows is ours."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from torch.utils.data import SequentialSampler

    def in_order(dataset: Any, **settings: Any) -> DefaultBatchSampler:  # noqa: ANN401
        return DefaultBatchSampler(SequentialSampler(dataset), **settings)

    lines = [json.loads(line) for line in Path(told.folder, "rows.jsonl").read_text().splitlines()]
    columns = {
        "anchor": [row["query"] for row in lines],
        "positive": [row["pos"][0] for row in lines],
        "negative": [row["neg"][0] for row in lines],
    }
    model = SentenceTransformer(told.model, device="cpu")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(batch_sampler=in_order, **_arguments(told)),
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=1 / rows_of.TEMPERATURE),
    )
    _in_turns(trainer, turns)


def _arguments(told: Told) -> dict[str, Any]:
    """Of transformers' trainer; its optimiser is its default, AdamW without weight decay, and it clips at 1 as ours."""
    return {
        "output_dir": f"{told.scratch}/out",
        "learning_rate": told.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": told.steps,
        "per_device_train_batch_size": told.queries,
        "dataloader_drop_last": True,
        "bf16": told.bf16,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _in_turns(trainer: Any, turns: Turns) -> None:  # noqa: ANN401 - one class a library
    """Trains, a step a turn."""
    from transformers import TrainerCallback

    losses: list[float] = []
    compute = trainer.compute_loss

    def recorded(*inputs: object, **options: object) -> Any:  # noqa: ANN401 - a tensor
        loss = compute(*inputs, **options)
        losses.append(loss.item())
        return loss

    class Holding(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            turns.ready()
            turns.wait()

        def on_step_end(self, *_: object, **__: object) -> None:
            turns.answer(losses[-1])
            turns.wait()

    trainer.compute_loss = recorded
    trainer.add_callback(Holding())
    trainer.train()


KINDS = {"FlagEmbedding": flag_embedding, "sentence-transformers": sentence_transformers, "ours": ours}


def main() -> None:
    turns, told = Turns(), Told(**json.loads(sys.argv[1]))
    import torch

    torch.set_num_threads(told.threads)
    KINDS[told.name.split()[0]](told, turns)
    turns.wait()  # until it is told that it may end


if __name__ == "__main__":
    main()
