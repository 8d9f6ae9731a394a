"""Mining that is killed anywhere goes on with what is left, and gives what it gives when nobody kills it."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayembed.config import Experiment
from rayembed.jobs import mine
from tests.jobs.cluster import Nodes, actors_below, cluster
from tests.jobs.conftest import Command, MakeExperiment, StartCommand

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MINE = {"range_for_sampling": "0-40", "negative_number": 11, "sampling_strategy": "random"}
PASSES = {  # where a pass marks its units done, in the order in which a run does them
    "vectors": "cache/vectors-*/done/*.json",
    "search": "cache/top-*/done/*.json",
    "pools": "cache/pools-*/done/*.json",
    "rows": "mine.partial/done/*.json",
}
Stamps = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def unbroken(
    local_ray: None, make_experiment: MakeExperiment, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What one worker mines that nobody kills, in few units."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    mine.run(make_experiment(out, mine=MINE, encode={"passages_per_unit": 70, "queries_per_unit": 50}))
    return digests(out)


@pytest.fixture(scope="module")
def nodes(ray_environment: None) -> Iterator[Nodes]:
    """A cluster of a head node and two worker nodes with a CPU each."""
    with cluster(2) as made:
        yield made


def small_units(make_experiment: MakeExperiment, output_dir: Path, **ray: Any) -> Experiment:  # noqa: ANN401
    units = {"passages_per_unit": 10, "queries_per_unit": 8}
    return make_experiment(output_dir, mine=MINE, encode=units, ray={"num_workers": 2, **ray})


def digests(output_dir: Path) -> dict[str, str]:
    """Of the rows in their order, however they are cut into files, and of what is told about them."""
    folder = output_dir / "mine"
    contents = {
        "rows": b"".join(path.read_bytes() for path in sorted(folder.glob("part-*.jsonl"))),
        "stats": (folder / "stats.json").read_bytes(),
        "audit": (folder / "audit.html").read_bytes(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def stamps(output_dir: Path) -> Stamps:
    """Inode and time of change of all that finished units wrote, by the path it has in the end."""
    found = {}
    for pattern in PASSES.values():
        for marker in output_dir.glob(pattern.replace("mine.partial", "mine*")):
            for path in (marker, *marker.parent.parent.glob(f"{marker.stem}*")):
                status = path.stat()
                relative = str(path.relative_to(output_dir)).replace("mine.partial", "mine")
                found[relative] = (status.st_ino, status.st_mtime_ns)
    return found


def wait_for(command: Command, output_dir: Path, name: str, *, units: int = 1) -> None:
    """Until this run of the command has marked so many units of a pass done."""
    before, deadline = len(list(output_dir.glob(PASSES[name]))), time.monotonic() + 240
    while len(list(output_dir.glob(PASSES[name]))) < before + units:
        assert command.process.poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.002)


@pytest.mark.timeout(600)  # five commands
@pytest.mark.long  # 110 s
def test_a_driver_that_is_killed_in_every_pass_costs_only_what_was_not_done(
    unbroken: dict[str, str], make_experiment: MakeExperiment, start_command: StartCommand, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    experiment = small_units(make_experiment, out)
    done: Stamps = {}
    for name in PASSES:
        command = start_command("mine", experiment)
        wait_for(command, out, name)
        actors = actors_below(command.process.pid)
        command.process.kill()
        command.process.wait()
        _, alive = psutil.wait_procs(actors, timeout=20)
        assert not alive, "what a dead driver leaves behind must not go on writing"
        assert actors, "killed while they work, or nothing is shown"
        assert not (out / "mine").exists(), "killed before the end, or nothing is shown"
        now = stamps(out)
        assert now.items() >= done.items(), f"units are done again by the run that was killed in {name}"
        assert len(now) > len(done)
        done = now
    status, output = start_command("mine", experiment).finish()
    assert status == 0, output
    assert stamps(out).items() >= done.items(), "units are done again"
    assert digests(out) == unbroken


def test_actors_on_a_cluster_end_with_their_driver(
    nodes: Nodes, make_experiment: MakeExperiment, start_command: StartCommand, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = start_command("mine", small_units(make_experiment, out, address=nodes.address))
    wait_for(command, out, "vectors")
    actors = actors_below(nodes.pid)
    command.process.kill()
    command.process.wait()
    _, alive = psutil.wait_procs(actors, timeout=20)
    assert not alive
    assert actors


@pytest.mark.long  # 45 s
def test_a_node_that_is_lost_changes_nothing_in_the_result(
    unbroken: dict[str, str],
    nodes: Nodes,
    make_experiment: MakeExperiment,
    start_command: StartCommand,
    tmp_path: Path,
) -> None:
    """The other node does what is left, and what was done stays."""
    out = tmp_path / "run"
    experiment = small_units(make_experiment, out, address=nodes.address)
    command = start_command("mine", experiment)
    wait_for(command, out, "vectors", units=11)  # all queries, then some passages
    nodes.remove()
    done = stamps(out)
    try:
        status, output = command.finish()
    finally:
        nodes.add()
    assert status == 0, output
    assert stamps(out).items() >= done.items(), "units are done again"
    assert digests(out) == unbroken
    workers = replace(experiment.ray, num_workers=1)
    assert "up to date" in start_command("mine", replace(experiment, ray=workers)).finish()[1]
