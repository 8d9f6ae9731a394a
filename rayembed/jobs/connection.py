"""Which Ray a job runs on, what it has, and plain words where none answers or where it is too small."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from joblib import cpu_count
from ray._private import services  # ray.init itself finds addresses and nodes by it
from ray.exceptions import RayError

from rayembed.config.ray import AUTO, LOCAL, RayConfig, check_address
from rayembed.config.wording import counted

logger = logging.getLogger(__name__)
ADDRESS, MODE = "RAY_ADDRESS", "RAY_AUTH_MODE"
TOKEN, TOKEN_FILE, HOME_TOKEN = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", Path(".ray") / "auth_token"
OF_THE_JOB = (ADDRESS, "RAY_JOB_CONFIG_JSON_ENV_VAR")  # a Ray of this machine would take them for its own
ANSWER_S = 5.0  # a machine that is there answers sooner
JOINING_S = 30.0  # nodes of a cluster that is being started may still be on their way
TOLD_EVERY_S = 30.0
NODE_GROUP = "ray.io/node-group"  # on nodes that KubeRay or the cluster launcher made, none on those of `ray start`
Resources = dict[str, float]


def address_of(config: RayConfig) -> str:
    """`local`, `auto` or host:port: ray.address, else RAY_ADDRESS (which `ray job submit` sets), else local.

    Raises:
        ValueError: RAY_ADDRESS is none that a job can run at.
    """
    told = os.environ.get(ADDRESS)
    if config.address not in (None, AUTO) or not told:
        return config.address or LOCAL
    try:
        check_address(told)
    except ValueError as error:
        raise ValueError(f"{ADDRESS}: {error}; or unset {ADDRESS}") from None
    return told


def on_this_machine(config: RayConfig) -> bool:
    """Whether a Ray is started for the command alone."""
    return address_of(config) == LOCAL


def start_local(config: RayConfig) -> str:
    """Starts a Ray of this machine, as large as the container, the batch job or the affinity of this process allows.

    Ray itself counts all cores where only the affinity is limited, and none where the quota is below one.

    Returns:
        host:port of its dashboard.

    Raises:
        ValueError: the machine has fewer cores than the workers need.
    """
    cpus = cpu_count()
    asked = config.fewest_workers * config.cpus_per_worker
    if asked > cpus:
        raise ValueError(
            f"ray.num_workers {config.fewest_workers} x ray.cpus_per_worker {config.cpus_per_worker} asks for {asked} "
            f"CPU cores; this machine has {cpus} for this process. Lower either, or set ray.address to a cluster"
        )
    with _without(OF_THE_JOB), signals_kept(), _quiet("ray._private.authentication.authentication_token_setup"):
        started = ray.init(
            address=LOCAL,
            num_cpus=cpus,
            include_dashboard=True,  # Ray Train cannot clean up after a stopped run without it
            log_to_driver=True,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    return str(started.dashboard_url or "")


def connect(address: str) -> str:
    """Connects to the Ray at an address, and logs in one line what it has.

    Returns:
        host:port of its dashboard; empty where it has none.

    Raises:
        ConnectionError: nothing answers there within seconds, it is no Ray, or it wants another token.
    """
    where = _located(address)
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray answers at {where} ({error}); {_named(address)}: start one there (ray start --head --port {port}) "
            "or correct the address, or set ray.address to local"
        ) from error
    # Ray itself would look for a minute.
    if not services.find_node_ids():  # type: ignore[no-untyped-call] # Ray types it not
        raise ConnectionError(
            f"a Ray may be at {where}, but this machine is no node of it, and a job's driver must run on one: submit "
            "the command (ray job submit --address http://HEAD:8265 -- rayembed ...), or start a node here (ray start "
            f"--address={where})"
        )
    with signals_kept(), _set_where_unset("RAY_gcs_server_port_wait_time_s", "3"):  # a Ray that listens answers at once
        try:
            found = ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            if "AuthenticationError" in f"{type(error)} {error} {error.__cause__}":  # or told in a traceback as text
                raise ConnectionError(f"the Ray at {where} refuses this process: {on_token()}") from error
            raise ConnectionError(
                f"no connection to the Ray at {where}: {_last_words(error)}; {_named(address)}. It must be the port of "
                "the head (6379 by default, not 8265 or 10001), and of the same version of Ray and Python"
            ) from error
    log_cluster(where)
    return str(found.dashboard_url or "")


def log_cluster(where: str) -> None:
    """One line on the cluster: address, nodes, CPUs, GPUs."""
    nodes = alive_nodes()
    total = {kind: sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    logger.info(
        "Ray at %s: %s, %s", where, counted(len(nodes), "node"), ", ".join(counted(total[kind], kind) for kind in total)
    )


def token_source() -> str | None:
    """Where Ray finds its token, without the token; None where it finds none."""
    if os.environ.get(TOKEN):
        return TOKEN
    if os.environ.get(TOKEN_FILE):
        return f"{TOKEN_FILE} {os.environ[TOKEN_FILE]}"
    home = Path.home() / HOME_TOKEN
    return str(home) if home.is_file() else None


def on_token() -> str:
    """What is wrong with the token of this process, and what to do."""
    mode, source = os.environ.get(MODE), token_source()
    put = f"put the cluster's token (`ray get-auth-token` on its head) into {TOKEN}, or a file that {TOKEN_FILE} names"
    if mode != "token":
        also = "" if source else f" and {put}"
        return f"it wants a token, and {MODE} is {mode or 'not set'}; set {MODE}=token{also}"
    if source is None:
        return f"{MODE} is token, and there is none in {TOKEN}, {TOKEN_FILE} or ~/{HOME_TOKEN}; {put}"
    return f"the token of {source} is not the cluster's; {put}"


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the Ray that runs, as Ray tells of them."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call] # Ray types it not


def resources_of_nodes() -> list[Resources]:
    """What each node of the Ray that runs has."""
    return [node["Resources"] for node in alive_nodes()]


def autoscales() -> bool:
    """Whether something adds nodes to the cluster; a cluster of `ray start` stays as it is."""
    return any(node.get("Labels", {}).get(NODE_GROUP) for node in alive_nodes())


def workers_with_room(nodes: Sequence[Resources], config: RayConfig, *, use_gpu: bool) -> int:
    """Workers that find their cores, and their GPU, on one node each."""
    found = 0
    for node in nodes:
        room = node.get("CPU", 0) // config.cpus_per_worker
        found += int(min(room, node.get("GPU", 0)) if use_gpu else room)
    return found


def await_room(config: RayConfig) -> None:
    """Returns when the cluster has room for the fewest workers, or will have when nodes are added.

    Raises:
        ValueError: it has none after half a minute, and nothing adds nodes.
    """
    deadline, told = time.monotonic() + JOINING_S, False
    while lack := lack_of_room(config):
        if autoscales():
            threading.Thread(target=_tell_what_is_awaited, args=(config,), daemon=True).start()
            return
        if time.monotonic() > deadline:
            raise ValueError(
                f"{lack}, and no autoscaler adds nodes. Lower ray.num_workers or ray.cpus_per_worker"
                f"{', set ray.use_gpu: false' if config.use_gpu else ''}, or add nodes"
            )
        if not told:
            logger.info("%s: waiting up to %g s for nodes that may be joining", lack, JOINING_S)
        told = True
        time.sleep(1)


def _tell_what_is_awaited(config: RayConfig) -> None:
    while ray.is_initialized():
        try:
            lack = lack_of_room(config)
        except (RayError, RuntimeError, OSError):  # Ray ends, and so does this
            return
        if not lack:
            return
        logger.info("%s: waiting for the autoscaler (`ray status` shows what it does)", lack)
        time.sleep(TOLD_EVERY_S)


def lack_of_room(config: RayConfig) -> str:
    """What the cluster has too little of, in words; empty where there is room."""
    nodes, asked = resources_of_nodes(), config.fewest_workers
    room = workers_with_room(nodes, config, use_gpu=config.use_gpu)
    if room >= asked:
        return ""
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    of_a_worker = f"{config.cpus_per_worker} CPU cores{' and a GPU' if config.use_gpu else ''}"
    return (
        f"ray.num_workers asks for {counted(asked, 'worker')} of {of_a_worker} each, and the cluster has room for "
        f"{room} ({counted(len(nodes), 'node')} with {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')})"
    )


def _located(address: str) -> str:
    """host:port of an address; of auto, what Ray finds on this machine."""
    try:
        return str(services.canonicalize_bootstrap_address(address))
    except ConnectionError as error:
        raise ConnectionError(
            f"ray.address is {address}, and no Ray runs on this machine; start one (ray start --head), give the "
            "address of a cluster (ray.address=HOST:6379), or set ray.address to local"
        ) from error


def _named(address: str) -> str:
    """Which setting the address is from."""
    return f"the address is that of {ADDRESS if os.environ.get(ADDRESS) == address else 'ray.address'}"


def _last_words(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]


@contextmanager
def signals_kept() -> Iterator[None]:
    """What SIGTERM and SIGINT do to this process stays as it was before the block.

    Ray takes SIGTERM when it is started, and prints the stack of its C++ code; Ray Train takes SIGINT, for good.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one may set them, so Ray does not
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by C code, which Python cannot put back
                signal.signal(number, handler)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _set_where_unset(name: str, value: str) -> Iterator[None]:
    ours = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if ours:
            del os.environ[name]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps Ray from advice that it gives at every start."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
