"""Sweeps on the toy data: with a dev split, and with settings that make a trial short."""

import shutil
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from tests.jobs.conftest import TRAIN, MakeExperiment

SPACE: dict[str, Any] = {"train.temperature": {"choice": [0.02, 0.1]}, "train.learning_rate": {"choice": [1e-3, 1e-2]}}


def with_dev_split(beir: Path, folder: Path) -> Path:
    """A copy of the toy data whose test split is its dev split too."""
    shutil.copytree(beir, folder)
    shutil.copy(folder / "qrels" / "test.tsv", folder / "qrels" / "dev.tsv")
    return folder


def make_sweep(
    make: MakeExperiment,
    out: Path,
    beir: Path,
    *,
    tune: dict[str, Any] | None = None,
    **sections: Any,  # noqa: ANN401
) -> Experiment:
    """An experiment with a sweep over temperature and learning rate, 5 steps a trial."""
    settings: dict[str, Any] = {
        "mine": {"range_for_sampling": "2-20", "negative_number": 4},
        "train": {**TRAIN, "num_train_epochs": 1},
        "tune": {"space": SPACE, "num_samples": 3, **(tune or {})},
    }
    data = {"train": [str(beir)], "corpus": [str(beir)], "evaluation": str(beir)}
    for name, given in sections.items():
        settings[name] = {**settings.get(name, {}), **given}
    settings["data"] = {**data, **settings.get("data", {})}
    return make(out, **settings)
