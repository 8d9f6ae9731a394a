"""The loop: its loss curve is FlagEmbedding's on the same batches, and a killed run ends as an unbroken one."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayembed.config import Experiment
from rayembed.data.plan import BatchPlan, choose_group
from rayembed.models.loading import dropout_keys, load_config
from rayembed.training.engine import Engine
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens

STEPS, BATCH, GROUP, SEED = 20, 8, 3, 42
SHARED: dict[str, Any] = {
    "learning_rate": 1e-4,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "max_steps": STEPS,
    "temperature": 0.02,
}
KINDS: dict[str, dict[str, Any]] = {
    "info_nce": {"pooling": "cls"},
    "kl_div": {"pooling": "mean", "knowledge_distillation": True, "kd_loss_type": "kl_div"},
    "m3_kd_loss": {"pooling": "cls", "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"},
}


@pytest.fixture(scope="module")
def still_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights without dropout."""
    own = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(tiny_model, own)
    config = load_config(str(tiny_model))
    for key in dropout_keys(config):
        setattr(config, key, 0.0)
    config.save_pretrained(own)
    return own


def frozen_batches(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of all steps in order, each a row with one positive and just the negatives that the plan chose."""
    plan, frozen = BatchPlan(len(rows), BATCH, SEED), []
    for number in range(STEPS):
        for row in plan.rows(number).tolist():
            values = rows[row]
            sizes = {"num_pos": len(values["pos"]), "num_neg": len(values["neg"]), "group_size": GROUP}
            positive, negatives = choose_group(SEED, plan.epoch(number), row, **sizes)
            frozen.append(
                {
                    "query": values["query"],
                    "pos": [values["pos"][positive]],
                    "neg": [values["neg"][i] for i in negatives],
                    "pos_scores": [values["pos_scores"][positive]],
                    "neg_scores": [values["neg_scores"][i] for i in negatives],
                }
            )
    return frozen


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loss_curve_equals_flag_embeddings(
    still_model: Path, tmp_path: Path, kind: str, record_property: Callable[[str, object], None]
) -> None:
    from tests.training.flag_embedding import losses_on

    rows = random_rows(36)  # four rows of each epoch sit out, other ones each time
    write_row_tokens(rows, still_model, tmp_path / "tokens")
    arguments = {**SHARED, "per_device_train_batch_size": BATCH, "train_group_size": GROUP, **KINDS[kind]}
    theirs = losses_on(frozen_batches(rows), still_model, tmp_path / "flag", arguments)
    assert len(theirs) == STEPS
    for workers, stage in ((1, 0), (2, 3)):
        ours = {**KINDS[kind], **SHARED, "mask_same_texts": False}  # theirs has no mask; some random queries are equal
        setup = experiment(still_model, workers=workers, stage=stage, group=GROUP, global_batch_size=BATCH, **ours)
        run = Run(tmp_path / f"ours-{workers}", tmp_path / "tokens")
        in_workers(workers, train_one, setup, run)
        difference = max(abs(own - other) for own, other in zip(run.losses(), theirs, strict=True))
        record_property(f"largest difference, {workers} workers, ZeRO {stage}", difference)
        assert difference < 2e-5, (workers, stage, run.losses(), theirs)
    assert max(theirs) - min(theirs) > 0.1, "the curve must move"


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2)])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    tiny_model: Path, tmp_path: Path, workers: int, stage: int
) -> None:
    write_row_tokens(random_rows(26), tiny_model, tmp_path / "tokens")
    setup = experiment(
        tiny_model,
        workers=workers,
        stage=stage,
        global_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        warmup_ratio=0.2,
        save_steps=2,
    )
    unbroken, broken = (Run(tmp_path / name, tmp_path / "tokens") for name in ("unbroken", "broken"))
    assert in_workers(workers, train_one, setup, unbroken) == [[2, 4]] * workers
    assert in_workers(workers, train_one, setup, broken, 4) == [[2, 4]] * workers
    assert not (broken.folder / "model").exists()
    assert in_workers(workers, train_one, setup, broken, None, 2) == [[4]] * workers  # the second epoch began at 3
    expected, found = unbroken.weights(), broken.weights()
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert [line["step"] for line in broken.metrics()] == [1, 2, 3, 4, 5, 6]
    assert broken.losses() == unbroken.losses()
    for rank in range(workers):  # of a checkpoint: the mean since the one before it, also after a restart
        loss = float((broken.checkpoint(4) / f"loss-{rank}").read_text())
        assert loss == pytest.approx(sum(unbroken.losses()[2:4]) / 2)


def test_every_step_has_its_figures(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(12), tiny_model, tmp_path / "tokens")
    settings = {"global_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "packed": False}
    setup = experiment(tiny_model, workers=2, stage=1, **settings)
    run = Run(tmp_path / "run", tmp_path / "tokens")
    in_workers(2, train_one, setup, run)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    for line in lines:
        assert line["negatives_per_query"] == 4 * 3 - 1
        assert line["queries_per_second"] * line["seconds"] == pytest.approx(4)
        assert 0 < line["padding_share"] < 1
        assert line["grad_norm"] > 0
        assert math.isfinite(line["loss"])


def failed(setup: Experiment, run: Run) -> tuple[str, int]:
    """The message, and how often the engine was told to step."""
    calls = []

    def step(engine: Engine) -> bool:
        calls.append(engine)
        return stepped(engine)

    stepped, Engine.step = Engine.step, step  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError) as error:
        train_one(setup, run)
    return str(error.value), len(calls)


def test_a_loss_that_is_no_number_stops_all_before_the_update_and_names_the_rows(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_row_tokens(random_rows(12), tiny_model, tmp_path / "tokens")
    settings: dict[str, Any] = {"global_batch_size": 4, "max_steps": 3, "learning_rate": 1e30, "max_grad_norm": 0}
    setup = experiment(tiny_model, workers=2, stage=0, gradient_accumulation_steps=2, **settings)
    run = Run(tmp_path / "run", tmp_path / "tokens")
    found = in_workers(2, failed, setup, run)
    assert found[0] == found[1], "workers agree"
    message, calls = found[0]
    rows = ["rows " + ", ".join(map(str, BatchPlan(12, 4, 42).rows(number))) for number in (2, 3)]
    assert f"the loss of step 2 is not finite in batch 2 ({rows[0]}); batch 3 ({rows[1]}); nothing was saved" in message
    assert "Lower train.learning_rate" in message
    assert calls == 3, "the two batches of step 1, and the first of step 2"
    assert [line["step"] for line in run.metrics()] == [1]


def test_a_collapsed_model_is_named_in_the_log_of_steps(tiny_model: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(tiny_model, flat)
    path = flat / "model.safetensors"
    weights = {name: value * 0 if value.ndim > 1 else value + 1 for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    write_row_tokens(random_rows(12), tiny_model, tmp_path / "tokens")
    settings: dict[str, Any] = {"global_batch_size": 4, "max_steps": 3, "logging_steps": 2, "learning_rate": 1e-9}
    setup = experiment(flat, workers=1, stage=0, **settings)
    setup = replace(setup, model=replace(setup.model, dropout=0.0))
    run = Run(tmp_path / "run", tmp_path / "tokens")
    in_workers(1, train_one, setup, run)
    assert [line.get("alarms", []) for line in run.metrics()] == [[], ["score_collapse"], ["score_collapse"]]


def test_minutes_save_in_the_loop_too(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(12), tiny_model, tmp_path / "tokens")
    setup = experiment(tiny_model, workers=1, stage=0, global_batch_size=4, max_steps=4, save_minutes=1e-9)
    assert in_workers(1, train_one, setup, Run(tmp_path / "run", tmp_path / "tokens")) == [[1, 2, 3]]
