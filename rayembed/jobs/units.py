"""Units of work on Ray Data: every pass over texts is a list of units, one row each, that any worker may do.

A unit's output has a name that follows from the plan alone, appears whole, and is marked done beside it. So a killed
run goes on with what is left, doing a unit twice does no harm, and results depend on neither the number of workers nor
their order. Ray Data holds names alone: texts and vectors go from disk to disk.
"""

import ctypes
import importlib
import json
import logging
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from rayembed.config.ray import RayConfig
from rayembed.config.wording import counted
from rayembed.data import mirror
from rayembed.data.copies import as_here, registered, shown
from rayembed.data.storage import write_atomic
from rayembed.jobs.session import quiet_worker, room_for
from rayembed.tracking.progress import Progress, duration

logger = logging.getLogger(__name__)
DONE = "done"
TRIES = "tries"  # Ray tries for ever, its own bounds leave a pool of dead actors waiting; so tries are counted here
MAKING = ".worker"
THREADS = "OMP_NUM_THREADS"
# oneDNN keeps up to 1,024 kernels with their buffers, one a shape, and batches of texts have many shapes: with 2,048
# passages a worker grew from 0.9 to 1.3 GB. With 8, and what is free given back after each unit, it stays at 0.6 GB.
FEW_PRIMITIVES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
Row = dict[str, Any]
SECONDS = "seconds"  # in the file that marks a unit done, beside its counts
TOLD, NAMED = 5, 50  # failed units whose error is in the message, and further ones that are named there


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    name: str
    """Names its output; unique in its folder."""

    size: int
    """How many texts (or queries) it holds, for the progress line."""

    spec: dict[str, Any]
    """What the worker is given, as JSON."""

    rows: str = ""
    """Which rows it holds, for messages: "rows 2048 to 4095 of passages"."""

    folder: Path | None = None
    """Where its output goes. None: the folder of the work."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done with each unit, and where."""

    what: str
    """First words of the progress line."""

    counted: str
    """What `Unit.size` counts, in the plural."""

    worker: str
    """module:Class; made once an actor with `arguments`, called with (spec, name, folder), returns counts as JSON.

    What it writes has its name when the call ends (`storage.whole_file` and the like), and in a run folder on an object
    store is there too."""

    arguments: dict[str, Any]
    folder: Path

    light: bool = False
    """Neither model nor GPU: one unit alone is done in this process, because another one takes longer to start."""


class UnitError(RuntimeError):
    """Some units could not be done; the others are kept."""


def run_units(
    units: Sequence[Unit], work: Work, config: RayConfig, *, use_gpu: bool | None = None
) -> list[dict[str, Any]]:
    """Does the units that are not done yet, on `ray.num_workers` actors, or as many as the cluster has room for.

    Args:
        units: the whole plan.
        work: the worker and the folder.
        config: actors, their resources, retries.
        use_gpu: one GPU an actor. None: as ray.use_gpu says.

    Returns:
        Each unit's counts, in the order of the plan.

    Raises:
        UnitError: units raised, or killed their worker more than `ray.max_unit_retries` times; the message names them
            and their rows.
    """
    units = [replace(unit, folder=unit.folder or work.folder) for unit in units]
    for folder in {work.folder, *(_folder(unit) for unit in units)}:
        folder.mkdir(parents=True, exist_ok=True)
    pending = _not_done(units)
    if pending:
        if len(pending) < len(units):
            logger.info(
                "%s: %d of %s are done already", work.what, len(units) - len(pending), counted(len(units), "unit")
            )
        _forget_tries(units, work)  # a new run, new tries
        start = time.monotonic()
        errors = _do(units, pending, work, config, config.use_gpu if use_gpu is None else use_gpu)
        _log_end(pending, work, time.monotonic() - start)
        _raise_if_failed(pending, work, errors)
        _forget_tries(units, work)
    mirror.all_here(map(_mark, units))
    return [{key: value for key, value in _record(unit).items() if key != SECONDS} for unit in units]


def _do(
    units: Sequence[Unit], pending: Sequence[Unit], work: Work, config: RayConfig, use_gpu: bool
) -> dict[Path, str]:
    """Does what is pending, and gives the errors of what could not be done.

    An actor that dies is made again by Ray. Where Ray gives up, the whole pool is made again for what is left: until
    all is done, or so many pools in succession brought nothing that no unit can have tries left.
    """
    sizes = {_mark(unit): unit.size for unit in pending}
    total = sum(unit.size for unit in units)
    progress = Progress(work.what, total, unit=work.counted, done=total - sum(sizes.values()))
    errors: dict[Path, str] = {}
    left, vain, lost = pending, 0, "was lost (see the logs of Ray)"
    while left and vain <= config.max_unit_retries + 1:
        try:
            for row in _stream(left, work, config, use_gpu):
                if row["error"]:
                    errors[Path(row["mark"])] = row["error"]
                else:
                    progress.add(sizes.pop(Path(row["mark"]), 0))
        except RayError as error:
            lost = f"was lost: {type(error).__name__}: {error}"
            logger.warning("%s: Ray lost its actors, what is left begins anew: %s", work.what, error)
        before, left = len(left), [unit for unit in _not_done(pending) if _mark(unit) not in errors]
        vain = vain + 1 if len(left) == before else 0
    return {_mark(unit): errors.get(_mark(unit), lost) for unit in _not_done(pending)}


def _stream(pending: Sequence[Unit], work: Work, config: RayConfig, use_gpu: bool) -> Iterable[Row]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0  # allowed one, Ray would wait for ever for an actor that is gone for good
    context.execution_no_progress_timeout_s = 6 * 3600
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments: dict[str, Any] = {
        "worker": work.worker,
        "arguments": work.arguments,
        "folder": str(work.folder),
        "threads": config.cpus_per_worker,
        "use_gpu": use_gpu,
        "max_retries": config.max_unit_retries,
        "num_workers": config.most_workers,
    }
    (work.folder / TRIES / MAKING).unlink(missing_ok=True)
    if copies := registered():
        arguments["copies"] = copies
    items = [{"mark": str(_mark(unit)), "spec": json.dumps(unit.spec)} for unit in pending]
    if work.light and len(items) == 1 and not use_gpu:
        return [_here(items[0], arguments)]
    return (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            UnitActor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(config.fewest_workers, len(items)),
                max_size=min(config.most_workers, len(items)),
                initial_size=min(room_for(config, use_gpu=use_gpu), len(items)),
                max_tasks_in_flight_per_actor=2,
            ),
            fn_constructor_kwargs=arguments,
            num_cpus=config.cpus_per_worker,
            num_gpus=1 if use_gpu else 0,
        )
        .iter_rows()
    )


def _here(item: dict[str, str], arguments: dict[str, Any]) -> dict[str, str]:
    """Does one unit in this process, whose environment stays: a Ray that is started later would inherit it."""
    before = dict(os.environ)
    try:
        return {"mark": item["mark"], "error": UnitActor(**arguments).do(**item)}
    finally:
        os.environ.clear()
        os.environ.update(before)


def _log_end(pending: Sequence[Unit], work: Work, seconds: float) -> None:
    left = {_mark(unit) for unit in _not_done(pending)}
    done = [unit for unit in pending if _mark(unit) not in left]
    if not done:
        return
    mirror.all_here(map(_mark, done))
    size, longest = sum(unit.size for unit in done), max(_record(unit)[SECONDS] for unit in done)
    logger.info(
        "%s: %s of %s %s took %s (%s %s/s; the longest unit %s)",
        *(work.what, counted(len(done), "unit"), f"{size:,}", work.counted, duration(seconds)),
        *(f"{size / max(seconds, 1e-9):,.1f}", work.counted, duration(longest)),
    )


def _raise_if_failed(pending: Sequence[Unit], work: Work, errors: dict[Path, str]) -> None:
    missing = [unit for unit in pending if _mark(unit) in errors]
    if not missing:
        return
    lines: list[str] = []
    told: set[str] = set()
    for unit in missing[:TOLD]:
        error = errors[_mark(unit)]
        lines.append(f"  {_named(unit, work)}: {'the same' if error in told else error}")
        told.add(error)
    if others := missing[TOLD : TOLD + NAMED]:
        lines.append(f"  and {len(missing) - TOLD} more: " + ", ".join(_named(unit, work) for unit in others))
    if len(missing) > TOLD + NAMED:
        lines[-1] += ", ..."
    raise UnitError(
        f"{work.what}: {len(missing)} of {counted(len(pending), 'unit')} failed, the others are kept in "
        f"{shown(work.folder)}:\n" + "\n".join(lines) + "\nRun the same command again to do only these"
    )


def _named(unit: Unit, work: Work) -> str:
    return f"{unit.name} ({unit.rows or f'{unit.size} {work.counted}'})"


def _folder(unit: Unit) -> Path:
    assert unit.folder is not None, "run_units sets it"
    return unit.folder


def _not_done(units: Sequence[Unit]) -> list[Unit]:
    there = {folder: mirror.names(folder / DONE) for folder in {_folder(unit) for unit in units}}
    left = []
    for unit in units:
        names, mark = there[_folder(unit)], _mark(unit)
        if not (mark.exists() if names is None else mark.name in names):
            left.append(unit)
    return left


def _forget_tries(units: Sequence[Unit], work: Work) -> None:
    for folder in {work.folder, *(_folder(unit) for unit in units)}:
        mirror.remove(folder / TRIES)


def _record(unit: Unit) -> dict[str, Any]:
    """A unit's counts, and its seconds."""
    record: dict[str, Any] = json.loads(_mark(unit).read_text())
    return record


def _mark(unit: Unit) -> Path:
    """The file that says that a unit is done."""
    return _folder(unit) / DONE / f"{unit.name}.json"


def _give_memory_back() -> None:
    """Hands what is free to the system, where the C library can (glibc): it keeps the holes between pieces in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tries_before(folder: Path, name: str) -> int:
    """How often this was tried before, and one more is noted: on disk, because a killed worker remembers nothing."""
    return mirror.count_up(folder / TRIES / name)


class UnitActor:
    """Runs in a Ray actor: holds one worker object, does units, marks them done."""

    def __init__(
        self,
        *,
        worker: str,
        arguments: dict[str, Any],
        folder: str,
        threads: int,
        use_gpu: bool,
        max_retries: int,
        num_workers: int,
        copies: Sequence[Sequence[str]] = (),
    ) -> None:
        quiet_worker()
        os.environ[THREADS] = str(threads)
        os.environ.setdefault(*FEW_PRIMITIVES)  # torch reads it when it first multiplies
        module, _, name = worker.partition(":")
        self._copies, self._tidy = copies, set[Path]()
        self._folder, self._max_retries = Path(as_here(folder, copies)), max_retries
        self._error, self._worker = "", None
        if _tries_before(self._folder, MAKING) >= num_workers + max_retries:  # so many that none is in the making now
            self._error = f"{worker} was killed again and again while it was made (memory? see the logs of Ray)"
            return
        try:
            arguments = as_here(arguments, copies)
            mirror.model_here(arguments)
            self._worker = getattr(importlib.import_module(module), name)(**arguments, threads=threads, use_gpu=use_gpu)
        except Exception as error:  # raised here, Ray would make the actor again and again; as a row, it ends the job
            self._error = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        (self._folder / TRIES / MAKING).unlink(missing_ok=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Does the units of a batch; an error becomes a row, so that the other units go on."""
        errors = [self.do(str(mark), str(spec)) for mark, spec in zip(batch["mark"], batch["spec"], strict=True)]
        return {"mark": [str(mark) for mark in batch["mark"]], "error": errors}

    def do(self, mark: str, spec: str) -> str:
        """Does one unit and writes the file that says so; returns its error, empty if there is none."""
        done = Path(as_here(mark, self._copies))
        folder, name = done.parent.parent, done.stem
        if folder not in self._tidy:  # this machine may have been at work here before, and the store be emptied since
            mirror.tidy(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._tidy.add(folder)
        if mirror.is_there(done):  # Ray sends a unit again when a node takes the answer with it
            return ""
        if self._worker is None:
            return self._error
        if _tries_before(folder, name) > self._max_retries:
            return f"killed its worker {counted(self._max_retries + 1, 'time')} (memory? see the logs of Ray)"
        start = time.monotonic()
        try:
            counts = self._worker(as_here(json.loads(spec), self._copies), name, folder)
        except Exception as error:  # whatever a unit raises is reported with its name, and the others go on
            return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        _give_memory_back()
        record = {**counts, SECONDS: round(time.monotonic() - start, 3)}
        write_atomic(done, json.dumps(record).encode())
        return ""
