"""The process group that a trainer sends weights through: it is rank 0, the workers of all replicas follow."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import HTTPException

from slipstream.checks import number, one_of
from slipstream.serving import machine, wire
from slipstream.serving.asking import ask_all, worst
from slipstream.serving.devices import check_devices_apart
from slipstream.serving.replica_process import Replica
from slipstream.serving.store import LONGEST_WAIT, Store

log = logging.getLogger("slipstream")


@dataclass(frozen=True)
class Group:
    """A process group: its name in the store, and the replicas in it, each with the incarnation that joined."""

    name: str
    members: dict[Replica, int]


class Communicator:
    """At most one process group.

    Args:
        store: Where ranks find each other.
        store_url, api_key: Where replicas reach it. Those with workers on other machines reach it where trainers do.
        timeout: Seconds in which a replica must have answered.
    """

    def __init__(self, store: Store, store_url: str, api_key: str, timeout: float) -> None:
        self._store = store
        self._url = store_url
        self._key = api_key
        self._timeout = timeout
        self._group: Group | None = None

    async def connect(
        self, message: wire.CommunicatorMessage, replicas: list[Replica], address: str = ""
    ) -> wire.CommunicatorReply:
        """Make a group for a trainer, in place of an earlier one. Replicas join after the answer.

        Args:
            address: The server's, at which it was asked.

        Raises:
            HTTPException: 400, wrong values, or workers that cannot come; 409, trainer and server share a device; 503,
                no replica is up.
        """
        _check(message, replicas, address)
        await self.disconnect()
        if not replicas:
            raise HTTPException(503, "no replica is up to take weights")
        group = Group(f"{secrets.token_hex(8)}/", {r: r.incarnation for r in replicas})
        self._group = group
        ranks = [replica.report.ranks if replica.report is not None else 0 for replica in replicas]
        world_size, first_rank = 1 + sum(ranks), 1
        failed: dict[Replica, Exception] = {}
        for replica, count in zip(replicas, ranks, strict=True):
            order = wire.ReplicaCommunicator(
                backend=message.backend, first_rank=first_rank, world_size=world_size, group=group.name,
                store_url=self._url_for(replica, address), api_key=self._key, timeout=message.timeout,
            )  # fmt: skip
            failed |= (await ask_all([replica], "/communicator", order, self._timeout))[1]
            first_rank += count
        if failed:
            await self.disconnect()
            raise worst(failed)
        return wire.CommunicatorReply(world_size=world_size, group=group.name)

    def _url_for(self, replica: Replica, address: str) -> str:
        if not address or replica.report is None or replica.report.shares_loopback:
            return self._url
        return machine.url_of(address, urlsplit(self._url).port)

    async def disconnect(self) -> None:
        """Let the replicas leave the group, if there is one."""
        group, self._group = self._group, None
        if group is None:
            return
        present = [replica for replica, started in group.members.items() if replica.is_still(started)]
        _, failed = await ask_all(present, "/communicator", None, self._timeout, method="DELETE")
        for replica, error in failed.items():
            log.warning("%s has not left the process group: %s", replica.name, error)
        self._store.drop(group.name)

    def members(self, up: list[Replica]) -> list[Replica]:
        """Replicas in the group: all that are `up`.

        Raises:
            HTTPException: 409, there is no group, or a replica has ended or come up since it was made.
        """
        if self._group is None:
            raise HTTPException(409, "transport='group' needs a process group: make one by POST /communicator")
        members = self._group.members
        changed = [replica for replica, started in members.items() if not replica.is_still(started)]
        changed += [replica for replica in up if replica not in members]
        if changed:
            names = ", ".join(replica.name for replica in changed)
            raise HTTPException(409, f"{names} ended or came up after the process group was made: make a new one")
        return list(members)


def _check(message: wire.CommunicatorMessage, replicas: list[Replica], address: str) -> None:
    try:
        one_of("backend", message.backend, ("nccl", "gloo"))
        number("timeout", message.timeout, above=0, most=LONGEST_WAIT)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    reports = {replica: replica.report for replica in replicas if replica.report is not None}
    for replica, report in reports.items():
        if machine.is_loopback(address) and not report.shares_loopback:
            raise HTTPException(
                400,
                f"{replica.name} has workers on other machines, which cannot reach the server at {address} as this "
                "trainer does: give the trainer an address in their network, on which the server listens (--host)",
            )
    if message.backend != "nccl":
        return
    for replica, report in reports.items():
        if not report.devices:
            raise HTTPException(400, f"backend='nccl' needs accelerators, and the server runs on {report.platform}")
        try:
            check_devices_apart(message.devices, report.devices)
        except ValueError as error:
            raise HTTPException(409, f"{replica.name}: {error}") from error
