"""ray.address: what a job can run at, and what is refused with what to do instead."""

import pytest

from rayembed.config.ray import RayConfig


@pytest.mark.parametrize("address", [None, "auto", "local", "10.0.0.1:6379", "head.example:6379", "[fd00::1]:6379"])
def test_allowed(address: str | None) -> None:
    assert RayConfig(address=address).address == address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ray://10.0.0.1:10001", "Ray Client"),
        ("http://10.0.0.1:8265", "the dashboard"),
        ("https://user:word@host", "'https://host' is of the dashboard"),
        ("10.0.0.1", "is none"),
        ("head:port", "is none"),
        ("", "is none"),
        ("a@b:1", "is none"),
        ("head:6379 ", "is none"),
    ],
)
def test_refused_with_what_to_do(address: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"ray job submit --address http://HEAD:8265 -- rayembed") as refused:
        RayConfig(address=address)
    assert reason in str(refused.value)
    assert "word" not in str(refused.value).partition("[type=")[0]
