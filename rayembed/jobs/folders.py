"""A job's folder: written beside its final name, resumed when it was left half done, reused when nothing changed."""

import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from rayembed.config.loading import dump
from rayembed.data.copies import shown
from rayembed.data.mirror import remove
from rayembed.data.storage import publish_folder, working_folder, write_changed
from rayembed.jobs.run_folder import as_asked

RECORD = "job.json"
LAYOUT = "units"
Reads = dict[str, Any]
Advice = Callable[[str], str]
logger = logging.getLogger(__name__)


def no_advice(_message: str) -> str:
    """Nothing beyond what every refusal says."""
    return ""


class ChangedError(ValueError):
    """A folder was made from something else than what is asked for now."""


def written_once(
    final: Path,
    reads: Reads,
    write: Callable[[Path], None],
    *,
    overwrite: bool,
    experiment: Experiment | None = None,
    layout: Sequence[int] = (),
    advice: Advice = no_advice,
) -> Path:
    """Runs `write` on a working folder and gives it its final name, unless it is there already.

    Args:
        final: the job's folder.
        reads: what the result depends on, as JSON: settings, fingerprints of weights and data.
        write: fills the folder; finds what an interrupted run of the same job left.
        overwrite: remove what was made from something else.
        experiment: written out as config.yaml beside `final` when the job has something to do. None: not written.
        layout: how the work is cut into units. An unfinished folder of another one cannot be gone on with and is begun
            anew; a finished one is the same.
        advice: what to add to a refusal.

    Returns:
        `final`.

    Raises:
        ChangedError: the folder, or an unfinished one, was made from something else; the message says from what.
    """
    working = working_folder(final)
    if working.exists() and not (working / RECORD).is_file():
        remove(working)  # killed before its first file was there: it holds nothing to resume
    for folder in (final, working):
        if folder.exists() and not overwrite:
            _refuse_changes(folder, changes(folder, reads), advice)
        elif folder.exists() and changes(folder, reads) != []:
            remove(folder)
    if final.exists():
        logger.info("%s: up to date, nothing to do", shown(final))
        return final
    record = {**reads, LAYOUT: list(layout)}
    if working.exists() and json.loads((working / RECORD).read_text()).get(LAYOUT) != record[LAYOUT]:
        logger.info("%s: the units of the unfinished run were cut otherwise; it is begun anew", shown(final))
        remove(working)
    working.mkdir(parents=True, exist_ok=True)
    if experiment is not None:
        write_changed(final.parent / "config.yaml", dump(as_asked(experiment)).encode())
    write_changed(working / RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
    write(working)
    publish_folder(final)
    return final


def changes(folder: Path, reads: Reads, *, but: Collection[str] = ()) -> list[str]:
    """What differs between what the folder was made from and `reads`, a line each.

    Args:
        folder: a job's.
        reads: see `written_once`.
        but: keys of `reads` that are not compared.
    """
    path = folder / RECORD
    if not path.is_file():
        return [f"{shown(folder)} has no {RECORD}"]
    was, now = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(reads)))
    return [
        f"{key}: was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key.partition(".")[0] not in (LAYOUT, *but)
    ]


def _refuse_changes(folder: Path, found: Sequence[str], advice: Advice) -> None:
    if found:
        lines = "\n  ".join(found)
        message = (
            f"{shown(folder)} was made from something else:\n  {lines}\nUse --overwrite to replace it, another "
            "output_dir to keep both, or set the settings back"
        )
        raise ChangedError(message + advice(message))


def state(
    final: Path, reads: Reads, *, overwrite: bool, coming: Collection[str] = (), advice: Advice = no_advice
) -> str:
    """In words for --dry-run: whether the job would run, resume, or has nothing to do.

    Args:
        final: the job's folder.
        reads: see `written_once`.
        overwrite: see `written_once`.
        coming: keys of `reads` that are known when jobs before this one have run, and are not compared now.
        advice: what to add to a refusal.

    Raises:
        ChangedError: as `written_once` would.
    """
    working, replaced = working_folder(final), False
    there = [final] if final.exists() else []
    there += [working] if (working / RECORD).is_file() else []
    for folder in there:
        found = changes(folder, reads, but=coming)
        if not overwrite:
            _refuse_changes(folder, found, advice)
        replaced |= found != []
    if replaced:
        return "was made from other settings and would be replaced"
    if not there:
        return "would be written"
    same = f" if its {' and '.join(coming)} stay as they were" if coming else ""
    return f"is up to date{same}" if final in there else f"was left half done and would be resumed{same}"


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
