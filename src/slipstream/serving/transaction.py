"""One weight update on its way to the replicas: what it is, who stages it, and when its trainer was last heard of."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from fastapi import HTTPException

from slipstream.checks import number, one_of
from slipstream.serving import wire
from slipstream.serving.replica_process import Replica
from slipstream.serving.shared_file import SharedFile
from slipstream.weights.layout import layout

SILENT_SECONDS = 10.0  # without a word from its trainer, after which another may begin
LARGEST_VERSION = 2**63 - 1


@dataclass
class Transaction:
    """Weights on their way.

    Attributes:
        members: Replicas that stage them, each with the incarnation that does.
        update: A name that no other update has.
        file: Where they are written; None with a process group.
        heard: When its trainer was last heard of.
    """

    number: int
    begin: wire.BeginMessage
    members: dict[Replica, int]
    file: SharedFile | None
    update: str = field(default_factory=lambda: secrets.token_hex(8))
    heard: float = field(default_factory=time.monotonic)

    def heard_now(self) -> None:
        """Its trainer has just made a call."""
        self.heard = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since its trainer was heard of."""
        return time.monotonic() - self.heard

    @property
    def active(self) -> bool:
        """Whether its trainer may be alive, so that no other may begin."""
        return self.silence < SILENT_SECONDS

    def present(self) -> list[Replica]:
        """Members that are still the processes that began."""
        return [replica for replica, started in self.members.items() if replica.is_still(started)]


def check_begin(message: wire.BeginMessage) -> int:
    """Bytes that the announced tensors need.

    Raises:
        HTTPException: 400, with the field, its value and what is allowed.
    """
    try:
        one_of("transport", message.transport, wire.TRANSPORTS)
        one_of("mode", message.mode, wire.MODES)
        number("version", message.version, least=0, most=LARGEST_VERSION, integer=True)
        return layout(message.tensors)[1]
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
