"""Addresses, and what a server shares with its workers: memory and the loopback, unless Ray has put them elsewhere."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
APART = (
    "transport={transport!r} takes weights through shared memory of the server's machine, and the server has workers "
    "on other machines: use 'group', or None to let the client choose"
)


def holds(path: str, nonce: bytes) -> bool:
    """Whether there is a file at `path` here that begins with `nonce`."""
    try:
        with open(path, "rb") as file:
            return file.read(len(nonce)) == nonce
    except OSError:
        return False


def loopback() -> str:
    """A name that two processes have in common if they reach each other at 127.0.0.1; empty if it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


def url_of(host: str, port: int | None) -> str:
    """Where a server at this address is reached."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether an IP address leads to nobody but this machine."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or parsed
    return parsed.is_loopback
