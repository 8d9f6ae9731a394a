"""Keys that stand in the URIs of the data are in no plan, no name of a source and no model card."""

from pathlib import Path

import pytest

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.data.prepare import Prepared
from rayembed.data.problems import Report
from rayembed.data.store import ROWS, StoreWriter
from rayembed.jobs import check, export, inputs

URI = "s3://KEY:SECRET@bucket/data?session_token=SECRET"


@pytest.fixture
def experiment(tiny_model: Path, tmp_path: Path) -> Experiment:
    return Experiment(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(name_or_path=str(tiny_model)),
        data=DataConfig(train=[URI], corpus=[URI], evaluation=URI),
        train=TrainConfig(),
    )


def assert_public(text: str) -> None:
    assert "s3://bucket/data" in text
    assert "KEY" not in text
    assert "SECRET" not in text


def test_plan_of_check(experiment: Experiment) -> None:
    assert_public(check.plan(experiment))


def test_name_of_the_rows(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = StoreWriter(tmp_path / "rows", ROWS, 2).finish()
    monkeypatch.setattr(inputs, "prepare", lambda *_, **__: Prepared(rows, None, None, Report()))
    assert_public(inputs.training_rows(experiment, after=())[1])


def test_model_card(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(experiment.output_dir)
    (out / "train").mkdir(parents=True)
    (out / "train" / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    compared = {"metric": "ndcg@10", "difference": 0.1, "ci95": [0.0, 0.2], "p_value": 0.5}
    measured: dict[str, object] = {
        "num_queries": 1,
        "num_passages": 2,
        "base": {"ndcg@10": 0.5},
        "tuned": {"ndcg@10": 0.6},
    }
    measured["significance"] = compared | {"wins": 1, "ties": 0, "losses": 0}
    monkeypatch.setattr(export, "_metrics", lambda _: measured)
    card = export.card(experiment, out, "least cosine 1.0")
    assert_public(card)
    assert "passages of `s3://bucket/data`" in card
