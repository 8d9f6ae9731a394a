"""The job export: wrong weights are found out, the card tells what was measured, other formats load."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from rayembed.config import Experiment
from rayembed.config.jobs import ExportConfig
from rayembed.jobs import export

pytestmark = pytest.mark.ray


@pytest.fixture
def copied(evaluated: Experiment, tmp_path: Path) -> Experiment:
    """A run folder whose model may be spoilt."""
    for name in ("train", "model", "evaluate"):
        shutil.copytree(Path(evaluated.output_dir) / name, tmp_path / "run" / name)
    return replace(evaluated, output_dir=str(tmp_path / "run"))


def test_weights_that_were_tampered_with_are_refused(copied: Experiment) -> None:
    file = Path(copied.output_dir) / "model" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.1.output.dense.weight"] *= 1.5
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(export.ExportError, match=r"least cosine .* below 0\.9999"):
        export.run(copied)


def test_pooling_that_was_tampered_with_is_refused(copied: Experiment) -> None:
    file = Path(copied.output_dir) / "model" / "1_Pooling" / "config.json"
    pooling = json.loads(file.read_text())
    file.write_text(json.dumps({**pooling, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(export.ExportError):
        export.run(copied)


def test_card_and_formats(copied: Experiment) -> None:
    model = export.run(replace(copied, export=ExportConfig(formats=["bfloat16"], probe_texts=8)))
    assert model == Path(copied.output_dir) / "model"
    card = (model / "README.md").read_text()
    metrics = json.loads((Path(copied.output_dir) / "evaluate" / "metrics.json").read_text())
    row = next(line for line in card.splitlines() if line.startswith("|") and "ndcg@10" in line.lower())
    assert f"{metrics['base']['ndcg@10']:.4f}" in row
    assert f"{metrics['tuned']['ndcg@10']:.4f}" in row
    half = AutoModel.from_pretrained(Path(copied.output_dir) / "model-bfloat16")
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    assert (Path(copied.output_dir) / "model-bfloat16" / "modules.json").is_file()


def test_without_a_model_it_says_what_to_run(copied: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `rayembed train` first"):
        export.run(replace(copied, output_dir=str(tmp_path / "other")))


def test_a_format_that_was_left_half_written_is_finished(copied: Experiment) -> None:
    asked = replace(copied, export=ExportConfig(formats=["bfloat16"]))
    export.run(asked)
    whole = Path(copied.output_dir) / "model-bfloat16"
    (whole / "model.safetensors").unlink()
    whole.rename(whole.with_name(whole.name + ".partial"))
    export.run(asked)
    assert (whole / "model.safetensors").is_file()


def test_the_card_shows_no_figures_of_other_weights(copied: Experiment) -> None:
    record = Path(copied.output_dir) / "evaluate" / "job.json"
    judged = json.loads(record.read_text())
    judged["weights"]["tuned"] = "others"
    record.write_text(json.dumps(judged))
    assert "Not evaluated yet" in (export.run(copied) / "README.md").read_text()
