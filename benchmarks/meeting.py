"""Ports of the loopback for processes that benchmarks start."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of the loopback that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def meeting_place() -> dict[str, str]:
    """The environment that says where torch.distributed meets: of runs that begin together, one alone would get the
    default."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
