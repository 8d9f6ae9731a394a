"""The Ray that the jobs run on: a cluster's if there is one, else a local one for the length of the command."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import ray

from rayembed.config.ray import RayConfig

logger = logging.getLogger(__name__)
_SHARED = ContextVar("_SHARED", default=False)


@contextmanager
def shared_session() -> Iterator[None]:
    """Jobs in this block share one Ray: the first that needs it starts it, and it ends with the block."""
    theirs = ray.is_initialized()
    token = _SHARED.set(True)
    try:
        yield
    finally:
        _SHARED.reset(token)
        if not theirs:
            ray.shutdown()


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connects to Ray; a local Ray that was started here ends with the block, or with that of `shared_session`.

    Raises:
        ValueError: the local machine has fewer cores or GPUs than the workers need.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            include_dashboard=True,  # Ray Train cannot clean up after a stopped run without it
            log_to_driver=True,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    try:
        if not address:
            _check_resources(config)
        yield
    finally:
        if not _SHARED.get():
            ray.shutdown()


def _check_resources(config: RayConfig) -> None:
    have = _resources()
    workers = config.fewest_workers
    cpus = workers * config.cpus_per_worker
    if cpus > have.get("CPU", 0):
        raise ValueError(
            f"ray.num_workers {workers} x ray.cpus_per_worker {config.cpus_per_worker} asks for {cpus} CPU "
            f"cores; this machine has {have.get('CPU', 0):.0f}. Lower either, or set ray.address to a cluster"
        )
    if config.use_gpu:
        check_gpus(config, "ray.use_gpu")


def _resources() -> dict[str, float]:
    """What the Ray that runs has."""
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call] # Ray types it not
    return have


def room_for(config: RayConfig, *, use_gpu: bool) -> int:
    """Workers that the Ray that runs has room for, at least the fewest and at most the most of ray.num_workers."""
    if not config.elastic:
        return config.most_workers
    have = _resources()
    room = have.get("CPU", 0) // config.cpus_per_worker
    room = min(room, have.get("GPU", 0)) if use_gpu else room
    return max(config.fewest_workers, min(config.most_workers, int(room)))


def check_gpus(config: RayConfig, setting: str) -> None:
    """Refuses work on GPUs that the Ray that runs does not have: it would wait for them for ever.

    Raises:
        ValueError: names the setting that asks for them.
    """
    have, workers = _resources(), config.fewest_workers
    if workers > have.get("GPU", 0):
        raise ValueError(
            f"{setting} with ray.num_workers {workers} asks for {workers} GPUs; there are "
            f"{have.get('GPU', 0):.0f}. Set {setting}: false, lower ray.num_workers, or set ray.address to a cluster"
        )


def log_from_worker() -> None:
    """Lets the progress lines of a worker process reach its output, which Ray brings to the driver."""
    log = logging.getLogger("rayembed")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)
