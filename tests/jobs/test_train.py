"""The job train: what it writes, the same weights on 1 and 2 workers, and what it refuses; with a real Ray."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayembed.config import Experiment
from rayembed.jobs import train
from rayembed.jobs.folders import ChangedError
from tests.jobs.toy_data import NUM_TRAIN, read_lines

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
BATCHES = NUM_TRAIN // 16
KEYS = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "seconds", "queries_per_second", "tokens_per_second"),
    *("padding_share", "negatives_per_query"),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((tensor - second[name]).abs().max().item() for name, tensor in first.items())


def test_every_step_is_in_the_log(trained: Experiment) -> None:
    lines = read_lines(Path(trained.output_dir) / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 2 * BATCHES + 1))
    assert [line["epoch"] for line in lines] == pytest.approx([i / BATCHES for i in range(1, 2 * BATCHES + 1)])
    assert all(KEYS <= line.keys() for line in lines)
    assert {line["negatives_per_query"] for line in lines} == {16 * 3 - 1}
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [1e-3 * (1 - i / (2 * BATCHES)) for i in range(2 * BATCHES)]
    )
    assert all(0 <= line["padding_share"] < 1 and line["tokens_per_second"] > 0 for line in lines)
    assert list((Path(trained.output_dir) / "train" / "tensorboard").iterdir())


def test_the_loss_falls(trained: Experiment) -> None:
    losses = [line["loss"] for line in read_lines(Path(trained.output_dir) / "train" / "metrics.jsonl")]
    assert sum(losses[BATCHES:]) < 0.9 * sum(losses[:BATCHES])


def test_two_workers_train_the_weights_of_one(trained: Experiment, tiny_model: Path, tmp_path: Path) -> None:
    experiment = replace(trained, output_dir=str(tmp_path / "run"), ray=replace(trained.ray, num_workers=2))
    train.run(experiment)
    one, two = weights(Path(trained.output_dir) / "model"), weights(tmp_path / "run" / "model")
    assert largest_difference(one, two) < 1e-5
    assert largest_difference(one, weights(tiny_model)) > 1e-3, "or nothing was trained"
    logs = [read_lines(Path(run.output_dir) / "train" / "metrics.jsonl") for run in (trained, experiment)]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], abs=1e-4)
    for key in ("negatives_per_query", "learning_rate", "epoch"):
        assert [line[key] for line in logs[0]] == [line[key] for line in logs[1]]


def test_another_learning_rate_is_refused_by_its_name(trained: Experiment) -> None:
    assert trained.train is not None
    other = replace(trained, train=replace(trained.train, learning_rate=2e-3))
    with pytest.raises(ChangedError, match=r"train\.learning_rate: was 0\.001, is 0\.002"):
        train.run(other)


def test_the_same_again_starts_nothing(trained: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("training was started"))
    assert train.run(trained) == Path(trained.output_dir) / "train"


def test_rows_without_negatives_are_refused_before_a_worker_starts(
    trained: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("training was started"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"baba {i}", "pos": ["didi"]}) + "\n" for i in range(32)))
    experiment = replace(
        trained, output_dir=str(tmp_path / "run"), data=replace(trained.data, train=[str(rows)], corpus=[])
    )
    with pytest.raises(ValueError, match=r"data\.train_group_size .* is 3.*has no negatives"):
        train.run(experiment)
