"""The network interface that a group's connections are made on: the one by which its members reach each other."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator

import torch.distributed as dist
from psutil import net_if_addrs

from slipstream.environment import variable

VARIABLE = "NCCL_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """Name of this machine's interface that has an IP address, or None. Every loopback address is the loopback's."""
    wanted = _parsed(address)
    if wanted is None:
        return None
    found = {name: {_parsed(entry.address) for entry in entries} for name, entries in net_if_addrs().items()}
    for name, addresses in found.items():
        if wanted in addresses or (wanted.is_loopback and any(a is not None and a.is_loopback for a in addresses)):
            return name
    return None


@contextlib.contextmanager
def nccl_on(address: str) -> Iterator[None]:
    """Have NCCL make its connections on the interface of `address`, unless the user has chosen another.

    NCCL asks once a process. One with a group of several ranks is left alone: these may be on other machines.
    """
    name = interface_of(address)
    several = dist.is_initialized() and dist.get_world_size() > 1
    if VARIABLE in os.environ or several or name is None:
        yield
        return
    with variable(VARIABLE, f"={name}"):  # the sign is for this very name, and not all that begin with it
        yield


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address without its zone; None for what is none, such as an interface's hardware address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, ipaddress.IPv6Address) else parsed
