"""What is different about a training that is one trial of a sweep."""

from dataclasses import dataclass

from ray.train import UserCallback

from rayembed.data.store import Store


@dataclass(frozen=True)
class AsTrial:
    """One training of several that run at a time."""

    name: str
    """Begins the lines of its log."""

    rows: Store
    """What is trained on: several trials share what was mined and scored once."""

    callbacks: tuple[UserCallback, ...]
    """Of Ray Train's controller."""
