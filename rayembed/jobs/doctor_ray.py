"""What `doctor` looks at in Ray: address, token, nodes, dashboard, room for the workers, paths that nodes share."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator

import ray

from rayembed.config import Experiment
from rayembed.config.ray import LOCAL, RayConfig
from rayembed.config.wording import counted
from rayembed.jobs.connection import (
    ADDRESS,
    MODE,
    address_of,
    alive_nodes,
    autoscales,
    connect,
    lack_of_room,
    on_token,
    start_local,
    token_source,
)
from rayembed.jobs.doctor_machine import Finding
from rayembed.jobs.shared_paths import NotSharedError, check_shared

SHOWN_NODES = 20
DASHBOARD = "Ray's dashboard"


def settings_of(experiment: Experiment | None) -> RayConfig:
    """Section ray, or its defaults."""
    return experiment.ray if experiment is not None else RayConfig()


def address(experiment: Experiment | None) -> Iterator[Finding]:
    """Which Ray the jobs would run on, and what says so."""
    config = settings_of(experiment)
    try:
        found = address_of(config)
    except ValueError as error:
        yield Finding("error", "Ray's address", ADDRESS, str(error))
        return
    source = "ray.address" if found == config.address else ADDRESS if os.environ.get(ADDRESS) == found else "default"
    what = "a Ray of this machine for the length of the command" if found == LOCAL else found
    yield Finding("ok", "Ray's address", f"{what} ({source})")


def authentication(experiment: Experiment | None) -> Iterator[Finding]:
    """Whether a token is asked for, and where it is read from; never the token."""
    mode, source = os.environ.get(MODE), token_source()
    try:
        local = address_of(settings_of(experiment)) == LOCAL
    except ValueError:
        local = False
    found = f"{MODE} {mode or 'not set'}; token from {source or 'nowhere'}"
    if mode == "token" and source is None and not local:
        yield Finding("error", "Ray's token", found, on_token())
    elif mode == "disabled" or (mode is None and not local):
        advice = (
            "whoever reaches the cluster's ports can run programs on it: start it with RAY_AUTH_MODE=token (cluster/)"
            if not local
            else "other users of this machine can reach its Ray while a job runs: unset RAY_AUTH_MODE"
        )
        yield Finding("warning", "Ray's token", found, advice)
    else:
        yield Finding("ok", "Ray's token", found)


def cluster(experiment: Experiment | None) -> Iterator[Finding]:
    """Connects, or starts a Ray, and looks at its nodes; Ray is shut down by the caller."""
    config = settings_of(experiment)
    try:
        where = address_of(config)
        dashboard = start_local(config) if where == LOCAL else connect(where)
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("error", "Ray", "no connection", str(error))
        return
    nodes = alive_nodes()
    for node in nodes[:SHOWN_NODES]:
        has = {kind: node["Resources"].get(kind, 0) for kind in ("CPU", "GPU")}
        memory = node["Resources"].get("memory", 0) / (1 << 30)
        found = f"{counted(has['CPU'], 'CPU')}, {counted(has['GPU'], 'GPU')}, {memory:.1f} GiB"
        yield Finding("ok", "node", f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {found}")
    if len(nodes) > SHOWN_NODES:
        yield Finding("ok", "node", f"and {len(nodes) - SHOWN_NODES} more")
    lack = lack_of_room(config)
    if not lack:
        yield Finding("ok", "room", f"room for {config.workers_in_words()} of {config.cpus_per_worker} CPU cores")
    elif autoscales():
        yield Finding("warning", "room", lack, "nodes must be added first")
    else:
        yield Finding("error", "room", lack, "lower it, or add nodes")
    yield _dashboard(dashboard)
    yield _shared(experiment, len(nodes))


def _dashboard(place: str) -> Finding:
    if not place:
        advice = 'start the head with it, from pip install "ray[default]": Ray Train and Tune clean up through it'
        return Finding("error", DASHBOARD, "there is none", advice)
    try:
        urllib.request.urlopen(f"http://{place}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        token = " (it wants a token)" if error.code == 401 else ""
        return Finding("ok", DASHBOARD, f"http://{place} answers {error.code}{token}")
    except OSError as error:
        advice = "to submit jobs from here, forward its port (ssh -L, kubectl port-forward)"
        return Finding("warning", DASHBOARD, f"http://{place}: {error}", advice)
    return Finding("ok", DASHBOARD, f"http://{place}")


def _shared(experiment: Experiment | None, nodes: int) -> Finding:
    what = "shared paths"
    if experiment is None or nodes == 1:
        return Finding("ok", what, "one node" if nodes == 1 else "no experiment was given, so none were tried")
    try:
        check_shared(experiment)
    except (NotSharedError, OSError) as error:
        return Finding("error", what, f"of {nodes} nodes not all see them", str(error))
    return Finding("ok", what, f"seen by {nodes} nodes")


def end() -> None:
    """Ends a Ray that was started here, or the connection."""
    ray.shutdown()
