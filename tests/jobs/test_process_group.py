"""Which network gloo is told to use."""

import os
import socket

import pytest

from rayembed.jobs import process_group
from rayembed.jobs.process_group import GLOO_INTERFACE, interface_of, is_loopback, name_interface


@pytest.mark.parametrize(
    ("node", "own", "given", "expected"),
    [
        ("10.0.0.7", "127.0.1.1", None, "eth7"),  # Debian's name of the host
        ("10.0.0.7", None, None, "eth7"),  # a name that is not known
        ("10.0.0.7", "10.0.0.7", None, None),
        ("10.0.0.7", "192.168.0.3", None, None),  # another network that hosts reach: the user's business
        ("127.0.0.1", "127.0.1.1", None, None),  # a local Ray
        ("10.0.0.8", "127.0.1.1", None, None),  # no interface has it
        ("10.0.0.7", "127.0.1.1", "ib0", "ib0"),
    ],
)
def test_gloo_is_told_the_interface_where_it_would_take_loopback(
    monkeypatch: pytest.MonkeyPatch, node: str, own: str | None, given: str | None, expected: str | None
) -> None:
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    if given is not None:
        monkeypatch.setenv(GLOO_INTERFACE, given)
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: node)
    monkeypatch.setattr(process_group, "_own_address", lambda: own)
    monkeypatch.setattr(process_group, "interface_of", {"10.0.0.7": "eth7"}.get)
    name_interface()
    assert os.environ.get(GLOO_INTERFACE) == expected
    os.environ.pop(GLOO_INTERFACE, None)


def test_addresses() -> None:
    assert is_loopback("127.0.1.1")
    assert is_loopback(None)
    assert not is_loopback("10.0.0.7")
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("203.0.113.9") is None
