"""The job `merge`: saved adapters go into the weights of the model, and the model is written as training writes it.

One process, no Ray: it reads the weights once and writes them once.
"""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from rayembed.config.jobs import MergeConfig
from rayembed.jobs.folders import RECORD, Reads, state, written_once
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.models.adapters import check_folders, merge_folders
from rayembed.models.export import max_seq_length
from rayembed.models.loading import load_config, pooling_of, weights_fingerprint
from rayembed.models.merging import tokens_of_adapters
from rayembed.models.settings_file import settings_of
from rayembed.models.trained import build_model, build_tokenizer, save_model

WHOLE = "whole"  # folder that is gone at the end
logger = logging.getLogger(__name__)


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Merges the adapters of section merge into the model, in their order.

    Args:
        experiment: sections merge, model, and what the family has of its own; section lora is not read.
        overwrite: replace a folder that was merged from something else.

    Returns:
        OUTPUT_DIR/merge: a model as `train` writes it, for transformers, sentence-transformers and FlagEmbedding.

    Raises:
        ValueError: no section merge, a family that takes no adapters, or adapters that do not fit.
        FileNotFoundError: the model is not there, or a folder holds no adapter.
        MergeError: merging changed vectors.
    """
    config = _section(experiment)
    final = Path(experiment.output_dir) / "merge"

    def write(folder: Path) -> None:
        _merge(experiment, config, folder)

    written = written_once(final, _reads(experiment, config), write, overwrite=overwrite, experiment=experiment)
    logger.info("merge: %s is %s", written, _in_words(experiment, config))
    return written


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    config = _section(experiment)
    where = state(Path(experiment.output_dir) / "merge", _reads(experiment, config), overwrite=overwrite)
    return f"merge: {_in_words(experiment, config)}; {where}"


def _in_words(experiment: Experiment, config: MergeConfig) -> str:
    return f"{experiment.model.name_or_path} with {', then '.join(config.adapters)}"


def _section(experiment: Experiment) -> MergeConfig:
    """The section, where what it names is there and can be merged."""
    if experiment.merge is None:
        raise ValueError("the experiment has no section merge; add one with the key adapters (folders)")
    if experiment.model.family == "reranker-encoder":
        raise ValueError(
            "a reranker-encoder takes no adapters: what its head gives is no vector a token that merging could be "
            "checked by; set model.family to what the adapters were trained on"
        )
    check_folders(experiment.merge.adapters, setting="merge.adapters")
    load_config(experiment.model.name_or_path, trust_remote_code=experiment.model.trust_remote_code)
    return experiment.merge


def _reads(experiment: Experiment, config: MergeConfig) -> Reads:
    """What the folder depends on: weights by themselves, and what is written beside them."""
    model = asdict(experiment.model)
    return {
        "weights": weights_fingerprint(experiment.model.name_or_path),
        "adapters": [weights_fingerprint(folder) for folder in config.adapters],
        "model": {key: value for key, value in model.items() if key not in ("name_or_path", "dropout")},
        "pooling": pooling_of(experiment.model),
        "max_seq_length": max_seq_length(experiment),
        **{name: asdict(section) for name, section in experiment.family_sections().items() if name != "lora"},
        "settings": settings_of(experiment),
    }


def _merge(experiment: Experiment, config: MergeConfig, folder: Path) -> None:
    for path in folder.iterdir():  # of a run that was killed
        if path.name != RECORD:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tokens = tokens_of_adapters(experiment, config.adapters)
    plain = replace(experiment, lora=None, model=replace(experiment.model, additional_special_tokens=tokens))
    model: Any = build_model(plain)
    model.backbone = merge_folders(model.backbone, config.adapters)
    save_model(model, build_tokenizer(plain), plain, folder / WHOLE)
    for path in (folder / WHOLE).iterdir():
        path.rename(folder / path.name)
    (folder / WHOLE).rmdir()
