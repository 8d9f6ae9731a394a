"""The job `harvest`: docstrings of installed packages become a BEIR folder (see rayembed/data/docstrings.py).

One process and some seconds: no Ray here.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from rayembed.config.jobs import HarvestConfig
from rayembed.config.wording import counted
from rayembed.data.copies import shown
from rayembed.data.docstrings import STATS_FILE, fingerprint, harvest
from rayembed.jobs.folders import ChangedError
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder

logger = logging.getLogger(__name__)


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Write the folder `harvest.output`, or leave it when it was written from the same settings and packages.

    Args:
        experiment: its section `harvest` is read.
        overwrite: replace a folder that was harvested from other settings or package versions.

    Returns:
        The BEIR folder.

    Raises:
        ValueError: no section `harvest`; the folder differs and `overwrite` is not set; the folder is not a harvest.
    """
    config = _section(experiment)
    folder = Path(config.output)
    changes = _changes(config)
    if changes == []:
        logger.info("harvest: %s is up to date", shown(folder))
        return folder
    if changes and not overwrite:
        raise _refusal(folder, changes)
    stats = harvest(config)
    splits = ", ".join(f"{count} {split}" for split, count in stats["splits"].items())
    counts = (stats["pairs"], splits, stats["docstrings"])
    logger.info("harvest: %d pairs (%s) of %d docstrings in %s", *counts, shown(folder))
    return folder


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would read and write, and what lies there already; reads no source file."""
    config = _section(experiment)
    changes = _changes(config)
    if changes is None:
        state = "does not exist yet, would be written"
    else:
        if changes and not overwrite:
            raise _refusal(Path(config.output), changes)
        state = f"is there, but {'; '.join(changes)}: would be replaced" if changes else "is up to date"
    versions = fingerprint(config)["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    limit = "all pairs" if config.max_pairs is None else f"at most {counted(config.max_pairs, 'pair')}"
    return f"harvest: {limit} of the docstrings of {packages}; {shown(config.output)} {state}"


def _section(experiment: Experiment) -> HarvestConfig:
    if experiment.harvest is None:
        raise ValueError("the experiment has no section harvest; add one with the key output (a folder)")
    return experiment.harvest


def _changes(config: HarvestConfig) -> list[str] | None:
    """What differs from the harvest that lies in the folder; None when there is none."""
    folder = Path(config.output)
    if not folder.exists():
        return None
    stats = folder / STATS_FILE
    if not stats.is_file():
        raise ValueError(
            f"{shown(folder)} exists and holds no {STATS_FILE}, so harvest did not write it and will not replace it; "
            "choose another harvest.output"
        )
    was = _flat(json.loads(stats.read_text(encoding="utf-8"))["fingerprint"])
    now = _flat(fingerprint(config))
    return [
        f"{key} was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _refusal(folder: Path, changes: Sequence[str]) -> ChangedError:
    return ChangedError(
        f"{shown(folder)} was harvested from something else: {'; '.join(changes)}. Use --overwrite to replace it, "
        "or another harvest.output to keep both"
    )


def _flat(fingerprint: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in fingerprint.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    return flat
