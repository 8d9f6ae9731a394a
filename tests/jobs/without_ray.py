"""The jobs without Ray: units are done in this process one after the other, as an actor does them."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest

from rayembed.config.ray import RayConfig
from rayembed.jobs.units import Unit, Work
from tests.jobs.units_here import actor_for, done_by


def do_units_here(patch: pytest.MonkeyPatch, *, backwards: bool = False) -> list[str]:
    """Takes the place of Ray where units are done, and where all jobs but train start it.

    Args:
        patch: undoes it.
        backwards: the last unit first, each by a worker of its own.

    Returns:
        "what: name" of each unit as it is done, a list that grows.
    """
    done: list[str] = []

    def stream(pending: Sequence[Unit], work: Work, config: RayConfig, use_gpu: bool) -> Iterator[dict[str, str]]:
        actor = actor_for(work)
        for unit in reversed(pending) if backwards else pending:
            actor = actor_for(work) if backwards else actor
            done.append(f"{work.what}: {unit.name}")
            yield done_by(actor, unit, work)

    patch.setattr("rayembed.jobs.units._stream", stream)
    for job in ("mine", "score", "evaluate"):
        patch.setattr(f"rayembed.jobs.{job}.ray_session", lambda _: nullcontext())
    patch.setenv("OMP_NUM_THREADS", "1")
    return done
