"""Settings of the cluster's resources."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from rayembed.config.base import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RayConfig:
    """Where the workers run and what each gets."""

    address: str | None = None
    """Ray cluster: auto, or host:port. null: the cluster of `ray job submit` if there is one, else a local Ray."""

    num_workers: int = Field(default=1, ge=1)
    """Training workers, and actors of every pass over texts."""

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
