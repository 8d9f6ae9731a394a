"""Settings of the cluster's resources."""

import re
from typing import Annotated

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT
from rayembed.config.uris import public_name
from rayembed.config.wording import counted

AUTO, LOCAL = "auto", "local"
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+):\d{1,5}")


def check_address(address: str) -> None:
    """Refuses an address that no job can run at, whether the experiment or RAY_ADDRESS says it.

    Raises:
        ValueError: says what to write.
    """
    if address in (AUTO, LOCAL) or _HOST_AND_PORT.fullmatch(address):
        return
    if address.startswith("ray://"):
        reason = (
            "is of Ray Client, whose driver is outside the cluster; Ray Train ends a run whose driver it cannot watch, "
            "and files would lie on another machine: "
        )
    elif "://" in address:
        reason = "is of the dashboard, which `ray job submit --address` takes: "
    else:
        reason = "is none: "
    raise ValueError(
        f"{public_name(address)!r} {reason}submit the command (ray job submit --address http://HEAD:8265 -- rayembed "
        f"...), run it on the head node with {AUTO}, or give {LOCAL} or HOST:PORT (6379 by default)"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RayConfig:
    """Where the workers run and what each gets."""

    address: str | None = None
    """Ray cluster: host:port of its head, auto (RAY_ADDRESS, else one that runs on this machine), or local (a Ray of
    this machine for the length of the command, whatever RAY_ADDRESS says). null: the cluster of `ray job submit` or of
    RAY_ADDRESS if there is one, else local."""

    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Training workers, and actors of every pass over texts. [1, 4]: as many as the cluster has room for, at least 1
    and at most 4; training goes on from its last checkpoint where their number changes, with the same global batch."""

    resize_interval_s: int = Field(default=60, ge=1)
    """Seconds between looks whether the cluster has room for more workers, with num_workers [1, 4]. More of them begin
    at the last checkpoint: what was done after it is done again."""

    use_gpu: bool = False
    """One GPU a worker."""

    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores of a worker: its threads of arithmetic."""

    max_failures: int = Field(default=0, ge=0)
    """Times that training restarts by itself, from its last checkpoint, after a worker died."""

    max_unit_retries: int = Field(default=2, ge=0)
    """Times that a unit of work is tried again after it killed its worker."""

    timeout_s: int = Field(default=300, ge=10)
    """Seconds until a collective between workers that does not answer is an error."""

    @field_validator("address")
    @classmethod
    def _reachable(cls, value: str | None) -> str | None:
        if value is not None:
            check_address(value)
        return value

    @field_validator("num_workers")
    @classmethod
    def _in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        """Fewest before most; [2, 2] is 2."""
        if isinstance(value, int):
            return value
        fewest, most = value
        if fewest > most:
            raise ValueError(f"found [{fewest}, {most}], must be [fewest, most]: write [{most}, {fewest}]")
        return value if fewest < most else fewest

    @property
    def fewest_workers(self) -> int:
        """Workers that training does not start without."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers at most."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of training workers may change in mid-run."""
        return self.fewest_workers < self.most_workers

    def workers_in_words(self) -> str:
        """Of training, for people: "2 workers", "1 to 4 workers"."""
        if self.elastic:
            return f"{self.fewest_workers} to {self.most_workers} workers"
        return counted(self.most_workers, "worker")
