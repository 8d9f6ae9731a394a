"""Seconds that Ray takes to start as the jobs start it, to answer from a worker, and to end; JSON on stdout."""

import json
import os
import time

import ray

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.jobs.session import ray_session


def main() -> None:
    """Prints the seconds of each."""
    experiment = Experiment(output_dir="runs/ray-start", model=ModelConfig(name_or_path="none"))
    start = time.monotonic()
    with ray_session(experiment):
        started = time.monotonic()
        ray.get(ray.remote(_answer).remote())
        answered = time.monotonic()
    seconds = {"start": started - start, "first answer": answered - started, "end": time.monotonic() - answered}
    print(json.dumps(seconds))


def _answer() -> int:
    return os.getpid()


if __name__ == "__main__":
    main()
