"""Numbers with their nouns."""

import pytest

from rayembed.config.ray import RayConfig
from rayembed.config.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "worker", "1 worker"),
        (0, "worker", "0 workers"),
        (1024, "query", "1,024 queries"),
        (1, "query", "1 query"),
        (2, "batch", "2 batches"),
        (2, "pass", "2 passes"),
        (3, "training row", "3 training rows"),
        (1.0, "CPU", "1 CPU"),
        (0.5, "CPU", "0.5 CPUs"),
        (2.0, "GPU", "2 GPUs"),
    ],
)
def test_a_number_and_its_noun(number: float, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected


def test_one_worker_is_one() -> None:
    assert [RayConfig(num_workers=number).workers_in_words() for number in (1, 2)] == ["1 worker", "2 workers"]
