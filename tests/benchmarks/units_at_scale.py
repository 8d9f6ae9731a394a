"""Ten thousand units of work on fifty logical nodes: does the driver keep up? Nothing is encoded; units write files.

Run: python -m tests.benchmarks.units_at_scale --units 10000 --nodes 50
(Each logical node is a raylet of its own on this machine and takes about 0.2 GB, each worker another 0.15 GB.)

Four drivers, each a process that is watched: half of the units with a SIGKILL of the driver in the middle, the rest by
the same call again, the call a third time with nothing left, and a merge: units that each read 100 files and write one.
What is printed: units a second, the driver's CPU time (its start and imports counted too) and memory, and how long it
took before the first unit. On 2 cores the nodes' processes share those with the driver: units a second are theirs.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import psutil

from tests.benchmarks.watching import ENVIRONMENT, markdown, megabytes

FOUND = 1000  # ids and scores in a unit's file: 12 kB, as the best ten of a hundred queries
MERGED = 100  # files that a unit of the merge reads


class Writes:
    """A worker whose units write a file each."""

    def __init__(self, *, threads: int, use_gpu: bool) -> None:
        pass

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, int]:
        draw = np.random.default_rng(spec["number"])
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, draw.random(FOUND, np.float32))
        return {"found": FOUND}


class Merges:
    """A worker whose units keep the best of several files."""

    def __init__(self, *, folder: str, threads: int, use_gpu: bool) -> None:
        self._from = Path(folder)

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, int]:
        every = np.concatenate([np.load(self._from / f"{one}.npy") for one in spec["names"]])
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, np.sort(every)[-FOUND:])
        return {"read": len(every)}


def names(units: int) -> list[str]:
    return [f"unit-{number:06d}" for number in range(units)]


def drive(what: str, folder: Path, units: int, nodes: int) -> None:
    """One driver: plans, runs, and writes what it saw to standard output."""
    import ray

    from rayembed.config.ray import RayConfig
    from rayembed.jobs.units import Unit, Work, run_units

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("rayembed").setLevel(logging.INFO)
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)
    config = RayConfig(num_workers=nodes)
    start = time.monotonic()
    every = names(units)
    if what == "merge":
        groups = [every[first : first + MERGED] for first in range(0, units, MERGED)]
        plan = [Unit(f"merged-{k:04d}", len(group), {"names": group}) for k, group in enumerate(groups)]
        worker, arguments, into = "Merges", {"folder": str(folder / "units")}, folder / "merged"
    else:
        plan = [Unit(name, 1, {"number": number}) for number, name in enumerate(every)]
        worker, arguments, into = "Writes", {}, folder / "units"
    planned = time.monotonic() - start
    work = Work(
        what=what, counted="units", worker=f"tests.benchmarks.units_at_scale:{worker}", arguments=arguments, folder=into
    )
    found = run_units(plan, work, config)
    seconds = time.monotonic() - start
    print(json.dumps({"planned": planned, "seconds": seconds, "units": len(found)}), flush=True)


def driven(what: str, options: argparse.Namespace, address: str, *, kill_at: int | None = None) -> dict[str, Any]:
    """Runs a driver to its end, or kills it when so many units are done; what it said, and the most that it held."""
    command = [sys.executable, "-m", "tests.benchmarks.units_at_scale", "--drive", what]
    command += ["--units", str(options.units), "--nodes", str(options.nodes), "--folder", str(options.folder)]
    done = options.folder / ("merged" if what == "merge" else "units") / "done"
    before, start, first, most, cpu = _count(done), time.monotonic(), None, 0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RAY_ADDRESS": address})
    while process.poll() is None:
        most, cpu = max(most, _peak(process.pid)), max(cpu, _cpu_seconds(process.pid))
        now = _count(done)
        if first is None and now > before:
            first = time.monotonic() - start
        if kill_at is not None and now >= kill_at:
            process.kill()
        time.sleep(0.5)
    assert process.stdout is not None
    said, seconds = process.stdout.read().splitlines(), time.monotonic() - start
    if kill_at is None and process.returncode:
        sys.exit(f"{what} ended with status {process.returncode}")
    new = _count(done) - before
    told = json.loads(said[-1]) if said else {}
    planned = told.get("planned")
    return {"what": what, "new": new, "seconds": seconds, "first": first, "peak": most, "cpu": cpu, "planned": planned}


def _count(folder: Path) -> int:
    return sum(1 for entry in os.scandir(folder) if entry.name.endswith(".json")) if folder.is_dir() else 0


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        working = one["seconds"] - (one["first"] or 0.0)
        rows.append(
            (
                one["what"],
                f"{one['new']:,}",
                f"{one['seconds']:.0f}",
                "-" if one["first"] is None else f"{one['first']:.1f}",
                "-" if one["first"] is None else f"{one['new'] / max(working, 1e-9):,.0f}",
                "-" if one["planned"] is None else f"{1000 * one['planned']:.0f}",
                f"{one['cpu']:.0f}",
                "-" if not one["new"] else f"{1000 * one['cpu'] / one['new']:.1f}",
                megabytes(one["peak"]),
            )
        )
    header = ("driver", "units done", "s", "s to the first", "units/s after it", "planned in ms")
    return markdown((*header, "driver's CPU s", "its ms a unit", "driver's peak RSS"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--drive", choices=("units", "resumed", "nothing left", "merge"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.folder, options.units, options.nodes)
        return 0
    os.environ.update(ENVIRONMENT)
    scratch = Path(mkdtemp(prefix="rs", dir="/tmp"))  # short: Ray's sockets lie below it
    (scratch / "ray").mkdir()
    os.environ.update({"RAY_TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(["", *sys.path]).strip(os.pathsep)})
    options.folder = options.folder or scratch / "work"
    from ray.cluster_utils import Cluster

    start = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(options.nodes):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, wait=False)
        cluster.wait_for_nodes(timeout=600)
        print(f"{options.nodes} nodes up in {time.monotonic() - start:.0f} s", flush=True)
        found = [driven("units", options, cluster.address, kill_at=options.units // 2)]
        found += [driven(what, options, cluster.address) for what in ("resumed", "nothing left", "merge")]
    finally:
        cluster.shutdown()
    print(table(found))
    whole = _count(options.folder / "units" / "done") == options.units
    shutil.rmtree(scratch, ignore_errors=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
