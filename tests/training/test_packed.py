"""Packed training is the training on padded texts, under ZeRO 3 too, and what cannot be packed is said or refused."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.models.chunks import TokenBatch, pack_chunks
from rayembed.models.loading import load_embedder
from rayembed.training import packed
from rayembed.training.batches import Batch
from rayembed.training.loop import trainable
from rayembed.training.packed import equal_chunks, reads_packed
from tests.models.tiny_architectures import save_tiny
from tests.training.made_batches import different_keys, one_dataset
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens


def test_losses_and_weights_are_those_of_padded_texts_on_one_worker(tiny_model: Path, tmp_path: Path) -> None:
    """Workers of ZeRO 3 have other numbers of chunks in some steps, and wait for each other in each of them."""
    write_row_tokens(random_rows(24), tiny_model, tmp_path / "tokens")
    runs = {}
    for how, workers, stage in (("padded", 1, 0), ("packed", 2, 3)):
        setup = experiment(
            tiny_model,
            workers=workers,
            stage=stage,
            global_batch_size=6,
            max_steps=4,
            learning_rate=1e-3,
            tokens_per_chunk=64,
            packed=how == "packed",
        )
        setup = replace(setup, model=replace(setup.model, dropout=0.0))
        runs[how] = Run(tmp_path / how, tmp_path / "tokens")
        in_workers(workers, train_one, setup, runs[how])
    assert runs["packed"].losses() == pytest.approx(runs["padded"].losses(), abs=1e-5)
    assert {line["padding_share"] for line in runs["packed"].metrics()} == {0.0}
    assert min(line["padding_share"] for line in runs["padded"].metrics()) > 0
    expected, found = runs["padded"].weights(), runs["packed"].weights()
    for name, value in expected.items():
        if name.endswith("key.bias"):  # no vector depends on it: its gradient is rounding, which AdamW makes large
            continue
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0, msg=name)


def test_texts_that_cannot_be_packed_are_padded_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def model(name: str) -> torch.nn.Module:
        return load_embedder(ModelConfig(name_or_path=str(save_tiny(name, tmp_path / name)), pooling="mean"))

    bert, mpnet = model("BERT"), model("MPNet")
    assert not reads_packed(TrainConfig(packed=False), bert, None)
    assert bert.backbone.config._attn_implementation == "sdpa", "it was not to be touched"  # type: ignore[union-attr]
    assert reads_packed(TrainConfig(), bert, None)
    with caplog.at_level(logging.INFO):
        assert not reads_packed(TrainConfig(), mpnet, None)
        assert not reads_packed(TrainConfig(), bert, mpnet)  # type: ignore[arg-type]
    why = "MPNetModel: MPNetModel takes no attention function from outside (its own is eager)"
    assert caplog.messages == [
        f"train: texts are padded; they cannot be packed: {why}",
        f"train: texts are padded; they cannot be packed: train.guide_model: {why}",
    ]
    with pytest.raises(ValueError, match=r"train\.packed is true, but .* set it to null or false\. MPNetModel: "):
        reads_packed(TrainConfig(packed=True), mpnet, None)


def test_further_chunks_change_no_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_embedder(ModelConfig(name_or_path=str(save_tiny("BERT", tmp_path)), pooling="mean"))
    assert reads_packed(TrainConfig(), model, None)
    texts = pack_chunks([[5, 6], [7, 8, 9], [10]], texts_per_chunk=2)
    assert len(texts.chunks) == 2
    dataset = one_dataset(experiment(tmp_path, workers=1, stage=0))
    batch = Batch((texts, pack_chunks([[3, 4]])), None, different_keys(1, 1), dataset)
    monkeypatch.setattr(packed, "largest_of_workers", lambda number, _device: number + 2)
    more: TokenBatch = equal_chunks(batch).inputs[0]
    assert [len(own.chunks) for own in equal_chunks(batch).inputs] == [4, 3]
    assert more.chunks[2:] == texts.chunks[1:] * 2
    torch.testing.assert_close(model.embed(more), model.embed(texts), atol=0, rtol=0)


def packed_by_each(folder: Path) -> bool:
    """Worker 1 cannot."""
    model = trainable(experiment(folder, workers=2, stage=3))
    if dist.get_rank() == 1:
        packed.why_not_packed = lambda *_, **__: "for a reason"
    return reads_packed(TrainConfig(), model, None)


def test_all_workers_pack_or_none_does(tiny_model: Path) -> None:
    """Else they would make other numbers of passes, for which ZeRO 3 waits."""
    assert in_workers(2, packed_by_each, tiny_model) == [False, False]
