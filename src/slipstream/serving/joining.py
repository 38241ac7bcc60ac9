"""How a trainer becomes rank 0 of a process group with a server's workers, once the server has time for it."""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec
import torch

from slipstream.serving import wire
from slipstream.serving.connection import CALL_SECONDS, Connection, ServerError
from slipstream.serving.devices import check_devices_apart, uuid_of
from slipstream.weights.transports import group

LOCKED = 423  # status: another update is under way
TAKEOVER_SECONDS = 30.0  # to wait for it; the server gives up a silent one after 10
JOIN_SECONDS = 60.0  # in which the workers must have come to a process group

M = TypeVar("M", bound=msgspec.Struct)


def patience(info: wire.ServerInfo) -> float:
    """Seconds to wait for the server's answer about an update.

    Longer than the server takes: it gives its replicas the time of a step to drop an update that was left behind or is
    refused, to do what is asked, and to be given what they have missed, and it may be giving that to one already. Its
    error says more than this side's deadline could.
    """
    return 4 * info.update_timeout + CALL_SECONDS


def ask_in_turn(connection: Connection, path: str, message: msgspec.Struct, kind: type[M], timeout: float) -> M:
    """POST a message. An update that a trainer left behind when it died stands in the way for some seconds."""
    deadline = time.monotonic() + TAKEOVER_SECONDS
    while True:
        try:
            return connection.post(path, message, kind, timeout=timeout)
        except ServerError as error:
            if error.status != LOCKED or time.monotonic() > deadline:
                raise
        time.sleep(0.5)  # between two questions to another process


def make_group(connection: Connection, device: torch.device, info: wire.ServerInfo, timeout: float) -> group.Group:
    """Make the process group, in place of an earlier trainer's.

    Args:
        device: That this trainer computes on.
        info: What the server says of itself.
        timeout: Seconds that a step of an exchange may take.

    Raises:
        ConnectionError: the server was lost, its workers did not come, or they are not as many as it says.
        ValueError: the two cannot be connected, or share an accelerator.
    """
    nccl = device.type == info.platform == "cuda"
    if not nccl and info.platform != "cpu":
        advice = "use 'shared_memory' or 'body'"
        if not info.shares_memory:
            advice = "no other reaches its workers on several machines"
        raise ValueError(
            f"transport='group' cannot connect a trainer on {device.type} with a server on {info.platform}; {advice}"
        )
    backend, devices = ("nccl", [uuid_of(device)]) if nccl else ("gloo", [])
    check_devices_apart(devices, [uuid for replica in info.replicas for uuid in replica.devices])
    message = wire.CommunicatorMessage(backend=backend, devices=devices, timeout=timeout)
    reply = ask_in_turn(connection, "/communicator", message, wire.CommunicatorReply, patience(info))
    try:
        _check_size(reply.world_size, connection.get("/server_info", wire.ServerInfo))
        store = group.HttpStore(connection.url, connection.key or "", reply.group, JOIN_SECONDS)
        return group.join(backend, store, 0, reply.world_size, timeout, device if nccl else torch.device("cpu"))
    except (group.GroupError, ValueError) as error:
        connection.call("DELETE", "/communicator")
        raise ConnectionError(f"{connection.url}: {error}") from error


def _check_size(world_size: int, info: wire.ServerInfo) -> None:
    """Raise ValueError unless the group is of this trainer and all workers of the replicas that are up."""
    workers = {i: replica.ranks for i, replica in enumerate(info.replicas) if replica.state in ("ready", "stale")}
    if world_size != 1 + sum(workers.values()):
        told = ", ".join(f"replica {i} has {count}" for i, count in workers.items()) or "none is up"
        raise ValueError(
            f"the process group is of {world_size - 1} workers and this trainer, but the server's replicas have others "
            f"now ({told}): one has ended or come up meanwhile; connect again"
        )
