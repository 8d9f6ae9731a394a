"""What `doctor` looks at on this machine: packages, compilers, GPUs, memory, disks, limits."""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
from joblib import cpu_count
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rayembed.config import Experiment
from rayembed.config.ray import RayConfig
from rayembed.config.wording import counted
from rayembed.jobs.connection import on_this_machine

Level = Literal["ok", "warning", "error"]
GIB = 1 << 30
LEAST_SHARED_MEMORY = 1 * GIB  # of /dev/shm: Docker gives 64 MiB, NCCL and Ray's object store want more
LEAST_MEMORY, LEAST_DISK = 4 * GIB, 10 * GIB
FULLEST = 0.95  # of a disk: above it Ray spills no objects
LEAST_FILES = 4096  # open at once; below it Ray warns
IN_PLACE_OF = {"faiss-cpu": ("faiss-gpu", "faiss-gpu-cu12")}  # the same module
LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # below Ray's folder of files


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    what: str
    found: str
    advice: str = ""
    """What to do, of warnings and errors."""


def python_version(_: Experiment | None) -> Iterator[Finding]:
    """This Python against what rayembed allows."""
    allowed = metadata.metadata("rayembed")["Requires-Python"] or ""
    version = platform.python_version()
    fits = SpecifierSet(allowed).contains(version, prereleases=True)
    found = f"{version} in {sys.prefix}"
    yield Finding("ok" if fits else "error", "Python", found, "" if fits else f"install Python {allowed}")


def packages(_: Experiment | None) -> Iterator[Finding]:
    """Installed versions against the ranges that rayembed's own metadata name; a row for each that does not fit."""
    fitting = []
    for text in metadata.requires("rayembed") or ():
        needed = Requirement(text)
        optional = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        version = _installed(needed.name)
        if version is None and (optional or any(map(_installed, IN_PLACE_OF.get(needed.name, ())))):
            continue
        if version is None:
            yield Finding("error", "package", f"{needed.name} is not installed", f'pip install "{_plain(needed)}"')
        elif not needed.specifier.contains(version, prereleases=True):
            level: Level = "warning" if optional else "error"
            found = f"{needed.name} {version}, and rayembed is made for {needed.specifier}"
            yield Finding(level, "package", found, f'pip install "{_plain(needed)}"')
        elif missing := _missing_of_extras(needed):
            found = f"{needed.name} {version} lacks {', '.join(missing)} of {_plain(needed)}"
            yield Finding("error", "package", found, f'pip install "{_plain(needed)}"')
        elif not optional:
            fitting.append(f"{needed.name} {version}")
    yield Finding("ok", "packages", f"rayembed {metadata.version('rayembed')}: {', '.join(fitting)}")


def gpus(experiment: Experiment | None) -> Iterator[Finding]:
    """GPUs, their driver, and the CUDA that torch was built for."""
    config = experiment.ray if experiment is not None else RayConfig()
    wanted = config.use_gpu and on_this_machine(config)
    built = f"torch {torch.__version__} for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"
    driver, there = _driver()
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable:
        names = [torch.cuda.get_device_properties(i) for i in range(usable)]
        each = ", ".join(f"{one.name} {one.total_memory / GIB:.0f} GiB" for one in names)
        short = wanted and usable < config.fewest_workers
        advice = f"ray.num_workers asks for {counted(config.fewest_workers, 'GPU')}: lower it" if short else ""
        yield Finding("error" if short else "ok", "GPUs", f"{each}; driver {driver}; {built}", advice)
    elif there:
        advice = (
            "install the torch that is built for CUDA (pytorch.org)"
            if torch.version.cuda is None
            else "the driver is too old for this torch, or CUDA_VISIBLE_DEVICES hides the GPUs"
        )
        yield Finding("error" if wanted else "warning", "GPUs", f"{there}; driver {driver}; {built}: unusable", advice)
    else:
        advice = "set ray.use_gpu: false, or ray.address to a cluster with GPUs" if wanted else ""
        yield Finding("error" if wanted else "ok", "GPUs", f"none here; {built}", advice)


def compilers(experiment: Experiment | None) -> Iterator[Finding]:
    """What DeepSpeed's operators and torch.compile are built with."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    beside = Path(sys.executable).parent / "ninja"  # a Ray worker's PATH may lack it, DeepSpeed then does too
    parts = {
        compiler: (shutil.which(compiler), "apt install g++, or name another in CXX"),
        "ninja": (shutil.which("ninja") or (str(beside) if beside.is_file() else None), "pip install ninja"),
        "Python.h": (str(header) if header.is_file() else None, "apt install python3-dev"),
    }
    missing = {name: advice for name, (place, advice) in parts.items() if place is None}
    found = ", ".join(f"{name}: {place or 'none'}" for name, (place, _) in parts.items())
    if not missing:
        yield Finding("ok", "compilers", found)
        return
    compiled = experiment is not None and experiment.train is not None and experiment.train.torch_compile
    use = "train.torch_compile and DeepSpeed's offloading to the CPU need them"
    yield Finding("error" if compiled else "warning", "compilers", found, f"{use}: {'; '.join(missing.values())}")


def memory(_: Experiment | None) -> Iterator[Finding]:
    """CPU cores and memory that this process may use, and the shared memory of the machine."""
    limit, free = _memory_limit(), psutil.virtual_memory().available
    level: Level = "warning" if min(free, limit) < LEAST_MEMORY else "ok"
    advice = "" if level == "ok" else "a worker holds a model and its texts: give the container or the machine more"
    cores, total = counted(cpu_count(), "core"), min(psutil.virtual_memory().total, limit)
    found = f"{cores}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    yield Finding(level, "memory", found, advice)
    place = Path("/dev/shm")
    if place.is_dir():
        size = shutil.disk_usage(place).total
        advice = "docker run --shm-size=8g, or in Kubernetes an emptyDir with medium: Memory at /dev/shm"
        fits = size >= LEAST_SHARED_MEMORY
        yield Finding("ok" if fits else "warning", "shared memory", f"{_size(size)} in {place}", "" if fits else advice)


def disks(experiment: Experiment | None) -> Iterator[Finding]:
    """Room where temporary files and the run folder lie, and whether Ray's sockets have paths short enough."""
    places = {"temporary files": Path(tempfile.gettempdir())}
    if experiment is not None and "://" not in experiment.output_dir:
        places["output_dir"] = Path(experiment.output_dir)
    for what, path in places.items():
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        usage = shutil.disk_usage(there)
        full = 1 - usage.free / usage.total
        level: Level = "error" if full > FULLEST else "warning" if usage.free < LEAST_DISK else "ok"
        advice = "" if level == "ok" else f"make room, or set {'TMPDIR' if what != 'output_dir' else what} elsewhere"
        yield Finding(level, what, f"{_size(usage.free)} free on {there} ({full:.0%} full)", advice)
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    length = len((folder.rstrip("/") + SOCKET).encode())
    advice = "" if length <= LONGEST_SOCKET else "set RAY_TMPDIR to a shorter path on a local disk"
    found = f"{length} of {LONGEST_SOCKET} characters below {folder}"
    yield Finding("error" if advice else "ok", "paths of Ray's sockets", found, advice)


def open_files(_: Experiment | None) -> Iterator[Finding]:
    """How many files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = soft if hard == resource.RLIM_INFINITY or soft == resource.RLIM_INFINITY else hard  # Ray raises it so far
    few = allowed != resource.RLIM_INFINITY and allowed < LEAST_FILES
    advice = "raise it (ulimit -n 65536; limits.conf; docker run --ulimit nofile=65536:65536)" if few else ""
    yield Finding("warning" if few else "ok", "open files", f"{_count(soft)}, at most {_count(hard)}", advice)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(needed: Requirement) -> str:
    """The requirement as pip takes it, without its marker."""
    extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
    return f"{needed.name}{extras}{needed.specifier}"


def _missing_of_extras(needed: Requirement) -> list[str]:
    """Packages that the asked extras of an installed package bring and that are not there."""
    missing = []
    for text in metadata.requires(needed.name) or ():
        part = Requirement(text)
        asked = part.marker is not None and any(part.marker.evaluate({"extra": extra}) for extra in needed.extras)
        if asked and _installed(part.name) is None:
            missing.append(part.name)
    return sorted(set(missing))


def _driver() -> tuple[str, str]:
    """Version of NVIDIA's driver and the names of its GPUs; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", ""
    asked = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} of nvidia-smi)", ""
    rows = [re.split(r",\s*", line, maxsplit=1) for line in told.splitlines() if line.strip()]
    return (rows[0][0], ", ".join(row[-1] for row in rows)) if rows else ("", "")


def _memory_limit() -> float:
    """Bytes that the container allows; infinite where it sets no limit."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            told = Path(file).read_text().strip()
        except OSError:
            continue
        if told.isdigit() and int(told) < 1 << 60:  # v1 writes a number near 2**63 for no limit
            return float(told)
    return float("inf")


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
