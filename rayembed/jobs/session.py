"""The Ray that the jobs run on: a cluster's if there is one, else a local one for the length of the command."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import ray

from rayembed.config import Experiment
from rayembed.config.ray import LOCAL, RayConfig
from rayembed.config.uris import PublicFormatter
from rayembed.config.wording import counted
from rayembed.jobs.connection import (
    address_of,
    autoscales,
    await_room,
    connect,
    resources_of_nodes,
    start_local,
    workers_with_room,
)
from rayembed.jobs.shared_paths import check_shared, warn_of_job_copies

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
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
def ray_session(experiment: Experiment) -> Iterator[None]:
    """Connects to Ray; a local Ray that was started here ends with the block, or with that of `shared_session`.

    Raises:
        ConnectionError: no cluster answers at the address, or it refuses the token.
        ValueError: the machine or the cluster has no room for the fewest workers, or a node of the cluster does not see
            what workers read and write.
    """
    if ray.is_initialized():
        check_shared(experiment)
        yield
        return
    config = experiment.ray
    address = address_of(config)
    try:
        if address == LOCAL:
            start_local(config)
            if config.use_gpu:
                check_gpus(config, "ray.use_gpu")
        else:
            connect(address)
            await_room(config)
            check_shared(experiment)
            warn_of_job_copies(experiment)
        yield
    finally:
        if not _SHARED.get():
            ray.shutdown()


def room_for(config: RayConfig, *, use_gpu: bool) -> int:
    """Workers that the Ray that runs has room for, at least the fewest and at most the most of ray.num_workers."""
    if not config.elastic:
        return config.most_workers
    room = workers_with_room(resources_of_nodes(), config, use_gpu=use_gpu)
    return max(config.fewest_workers, min(config.most_workers, room))


def check_gpus(config: RayConfig, setting: str) -> None:
    """Refuses work on GPUs that the Ray that runs does not have: it would wait for them for ever.

    Raises:
        ValueError: names the setting that asks for them.
    """
    workers = config.fewest_workers
    have = sum(node.get("GPU", 0) for node in resources_of_nodes())
    if workers > have and not autoscales():
        raise ValueError(
            f"{setting} with ray.num_workers {workers} asks for {counted(workers, 'GPU')}; there are {have:.0f}. Set "
            f"{setting}: false, lower ray.num_workers, or set ray.address to a cluster"
        )


def quiet_worker() -> None:
    """Keeps libraries from bars of progress and advice, of which a job's log would be full.

    A worker has the environment of its node, not that of the command.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # else it reads the environment when it is loaded
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def log_from_worker(name: str = "") -> None:
    """Lets the progress lines of a worker process reach its output, which Ray brings to the driver.

    Args:
        name: begins every line. Empty: none is needed.
    """
    quiet_worker()
    log = logging.getLogger("rayembed")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PublicFormatter(f"%(asctime)s {name and name + ': '}%(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train lets all libraries tell, and itself of each checkpoint
