"""What a cluster costs and gives: submit to first step, scaling from 1 to 2 workers, a trial's overhead, idle memory.

Run: python -m tests.benchmarks.cluster_times
(From the repository's root, with the extra quickstart; 15 minutes on 2 cores that do nothing else.)

The cluster is a head without CPUs and two nodes of one CPU each, `ray start` on this machine with a token; every
command is sent by `ray job submit`. all-MiniLM-L6-v2 on a part of the quickstart's data: the same texts are encoded,
and the same global batch is trained on, with one worker of one core and with two, so that the ideal is twice the rate.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

from tests.benchmarks.watching import Watched, checked, markdown, megabytes, watch
from tests.jobs.started_nodes import BIN, Cluster, started_nodes

QUICKSTART = Path("configs/quickstart.yaml")
WARM_UP = 5  # steps that do not count
STEP_LINE, DRIVER_LINE = r"train 1/\d+ steps", r"Ray at [\d.]+:\d+: "
MINED = r" mine: /.* \("
ENCODED = r"encode ([\w ]+): [\d,]+ units? of [\d,]+ \w+ took .* \(([\d,.]+) \w+/s"


def experiment(folder: Path, name: str, *, workers: int, pairs: int, steps: int) -> dict[str, Any]:
    """The quickstart's settings for one run of the benchmark."""
    settings: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
    data = str(folder / "data")
    for key in ("score", "evaluate", "export"):
        del settings[key]
    settings["harvest"] |= {"output": data, "max_pairs": pairs}
    settings["data"] |= {"train": [data], "corpus": [data], "evaluation": data}
    train = {"global_batch_size": 32, "max_steps": steps, "logging_steps": 1, "save_steps": steps}
    settings["train"] = {
        key: value for key, value in settings["train"].items() if key != "per_device_train_batch_size"
    } | train
    return settings | {"output_dir": str(folder / name), "ray": {"num_workers": workers}}


def submitted(cluster: Cluster, folder: Path, name: str, job: str, settings: dict[str, Any]) -> Watched:
    """Submits a job and follows it to its end."""
    sources, log = folder / f"{name}-sources", folder / f"{name}.log"
    sources.mkdir()
    (sources / "experiment.yaml").write_text(yaml.safe_dump(settings))
    command = [BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", sources, "--"]
    print(f"{name}: {job} ...", flush=True)
    return checked(
        watch([*command, BIN / "rayembed", job, "experiment.yaml"], log=log, environment=given(cluster)), log
    )


def given(cluster: Cluster) -> dict[str, str]:
    return {name: value for name, value in cluster.environment.items() if name.startswith("RAY_")}


def when(watched: Watched, pattern: str) -> float:
    """Seconds after the start at which a line came."""
    return next(seconds for seconds, line in watched.lines if re.search(pattern, line))


def encoding_rates(watched: Watched) -> dict[str, float]:
    """Texts a second by what was encoded, with the start of the workers."""
    found = [re.search(ENCODED, line) for _, line in watched.lines]
    return {match[1]: float(match[2].replace(",", "")) for match in found if match is not None}


def step_seconds(out: Path) -> list[float]:
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines()
    return [float(json.loads(line)["seconds"]) for line in lines]


def idle(cluster: Cluster) -> dict[str, int]:
    """Bytes of each node's processes, shared pages counted once, before anything ran."""
    found = {}
    for number, node in enumerate(cluster.nodes):
        parent = psutil.Process(node.pid)
        held = sum(process.memory_full_info().pss for process in [parent, *parent.children(recursive=True)])
        found["head" if number == 0 else f"worker node {number}"] = held
    return found


def scaling(cluster: Cluster, folder: Path, pairs: int, steps: int) -> list[tuple[str, float, float, str]]:
    """Rates of one worker and of two."""
    encoded, mined, trained = [], [], []
    for workers in (1, 2):
        name = f"workers-{workers}"
        settings = experiment(folder, name, workers=workers, pairs=pairs, steps=steps)
        watched = submitted(cluster, folder, name, "run", settings)
        encoded.append(encoding_rates(watched))
        mined.append(pairs / (when(watched, MINED) - when(watched, DRIVER_LINE)))
        trained.append(32 / median(step_seconds(folder / name)[WARM_UP:]))
    rows = [(f"encoding {what}, a second", one, encoded[1][what]) for what, one in encoded[0].items()]
    rows += [("all of mining, pairs a second", *mined), ("training, queries a second", *trained)]
    return [(what, one, two, f"{two / one:.2f} ({two / one / 2:.0%})") for what, one, two in rows]


def start_up(cluster: Cluster, folder: Path, pairs: int) -> list[tuple[str, float]]:
    """Seconds from `ray job submit` of a training whose rows are there."""
    settings = experiment(folder, "start", workers=1, pairs=pairs, steps=2)
    for key in ("harvest", "mine"):
        del settings[key]
    settings["data"] |= {"train": [str(folder / "workers-1" / "mine")]}
    watched = submitted(cluster, folder, "start", "train", settings)
    first = [
        ("to the driver's first line", when(watched, DRIVER_LINE)),
        ("to the first step", when(watched, STEP_LINE)),
    ]
    return [*first, ("to the end of the command, after 2 steps", watched.seconds)]


def trial_overhead(cluster: Cluster, folder: Path, pairs: int, steps: int) -> list[tuple[str, float]]:
    """Of a trial with a place for itself: all its seconds, those of its steps, and the rest."""
    settings = experiment(folder, "sweep", workers=1, pairs=pairs, steps=steps)
    settings["train"] |= {"eval_steps": steps, "eval_queries": 100, "eval_passages": 300}
    space = {"train.temperature": {"choice": [0.03, 0.07]}}
    settings["tune"] = {"space": space, "num_samples": 3, "scheduler": "none", "max_concurrent": 1}
    submitted(cluster, folder, "sweep", "tune", settings)
    every, computed = [], []
    for trial in sorted((folder / "sweep" / "tune" / "trials").iterdir()):
        every.append(float(json.loads((trial / "result.json").read_text())["seconds"]))
        computed.append(sum(step_seconds(trial)))
    rest = [whole - own for whole, own in zip(every, computed, strict=True)]
    return [
        ("a trial", median(every)),
        (f"its {steps} steps", median(computed)),
        ("the rest: start, two evaluations, end", median(rest)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3600, help="that are harvested and encoded")
    parser.add_argument("--steps", type=int, default=25, help="of a training")
    options = parser.parse_args(argv)
    logging.disable(logging.INFO)
    with TemporaryDirectory() as scratch, started_nodes(2) as cluster:
        folder = Path(scratch)
        held = [(name, megabytes(number)) for name, number in idle(cluster).items()]
        scaled = scaling(cluster, folder, options.pairs, options.steps)
        began = start_up(cluster, folder, options.pairs)
        tried = trial_overhead(cluster, folder, options.pairs, options.steps)
    sys.stdout.write(f"\n{markdown(('idle', 'memory'), held)}\n\n")
    rows = [(what, f"{one:,.1f}", f"{two:,.1f}", share) for what, one, two, share in scaled]
    sys.stdout.write(f"{markdown(('', '1 worker', '2 workers', 'times (of twice)'), rows)}\n\n")
    rows = [(what, f"{seconds:.1f}") for what, seconds in [*began, *tried]]
    sys.stdout.write(f"{markdown(('from `ray job submit`; a sweep', 'seconds'), rows)}\n")


if __name__ == "__main__":
    main()
