"""Torch's process group of training workers, beyond what Ray Train sets up by itself."""

import fcntl
import ipaddress
import os
import socket
import struct
from typing import Any

import ray.train
import ray.util
from ray.train.torch import TorchConfig

from rayembed.training.leaving import watch_sigterm

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_ADDRESS_OF = 0x8915  # SIOCGIFADDR of Linux


class ProcessGroup(TorchConfig):
    """Workers that find each other, and a SIGTERM that asks: training runs in a thread that cannot listen to it."""

    @property
    def backend_cls(self) -> type[ray.train.backend.Backend]:
        """What Ray Train does in each worker before training."""
        theirs: Any = super().backend_cls

        class Prepared(theirs):  # type: ignore[misc] # a class that Ray names at run time alone
            def on_start(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ANN401 - classes that Ray keeps to itself
                worker_group.execute(name_interface)
                super().on_start(worker_group, backend_config)
                worker_group.execute(watch_sigterm)

        return Prepared


def name_interface() -> None:
    """Tells gloo which network this worker is on, where it would take another one.

    Gloo listens at the address that the host's own name has, and on Debian that is 127.0.1.1: no other host reaches it.
    Ray knows by which address this one is reached.
    """
    if GLOO_INTERFACE in os.environ:
        return
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call] # Ray types it not
    if is_loopback(address) or not is_loopback(_own_address()):
        return
    name = interface_of(address)
    if name is not None:
        os.environ[GLOO_INTERFACE] = name


def is_loopback(address: str | None) -> bool:
    """Whether an address reaches this host alone. None: it has none, and gloo takes loopback."""
    return address is None or ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address. None: there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(asking.fileno(), _ADDRESS_OF, request)[20:24]
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return None


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
