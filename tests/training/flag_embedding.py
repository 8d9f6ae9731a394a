"""FlagEmbedding's runner, data set, collator, model and trainer, fed with batches in a given order."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from FlagEmbedding.abc.finetune.embedder import (
    AbsDataset,
    AbsEmbedderDataArguments,
    AbsEmbedderModelArguments,
    AbsEmbedderTrainingArguments,
)
from FlagEmbedding.finetune.embedder.encoder_only.base import EncoderOnlyEmbedderRunner, EncoderOnlyEmbedderTrainer
from torch.utils.data import SequentialSampler


class Recording(EncoderOnlyEmbedderTrainer):  # type: ignore[misc] # untyped
    """Takes the rows in order and keeps every loss, unrounded."""

    losses: list[float]

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *inputs: object, **options: object) -> torch.Tensor:
        loss: torch.Tensor = super().compute_loss(*inputs, **options)
        self.losses.append(loss.item())
        return loss


class Runner(EncoderOnlyEmbedderRunner):  # type: ignore[misc] # untyped
    """Only the trainer's class differs."""

    def load_trainer(self) -> Recording:
        return Recording(
            model=self.model,
            args=self.training_args,
            train_dataset=self.train_dataset,
            data_collator=self.data_collator,
            processing_class=self.tokenizer,
        )


def losses_on(rows: list[dict[str, Any]], model: Path, folder: Path, arguments: dict[str, Any]) -> list[float]:
    """The loss of each step; every row has one positive and no more negatives than its group needs."""
    folder.mkdir()
    data = folder / "frozen.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = dict(arguments)
    runner = Runner(
        model_args=AbsEmbedderModelArguments(model_name_or_path=str(model)),
        data_args=AbsEmbedderDataArguments(
            train_data=[str(data)],
            cache_path=str(folder / "cache"),
            query_max_len=10,
            passage_max_len=24,
            train_group_size=rest.pop("train_group_size"),
            knowledge_distillation=rest.pop("knowledge_distillation", False),
        ),
        training_args=AbsEmbedderTrainingArguments(
            output_dir=str(folder / "out"),
            sentence_pooling_method=rest.pop("pooling"),
            optim="adamw_torch",
            lr_scheduler_type="linear",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            **rest,
        ),
    )
    runner.trainer.losses = []
    with pytest.MonkeyPatch.context() as patch:  # m3_kd_loss depends on the order of a group's negatives
        in_order = SimpleNamespace(choice=lambda only: only[0], sample=lambda every, count: every[:count])
        patch.setattr(AbsDataset, "random", in_order)
        runner.trainer.train()
    losses: list[float] = runner.trainer.losses
    return losses
