"""What was pushed last, and the replicas that have missed it: they are given it while it is in shared memory."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator

from slipstream.serving import wire
from slipstream.serving.asking import ReplicaRefused
from slipstream.serving.replica_process import Replica
from slipstream.serving.shared_file import OFFSET, SharedFile

log = logging.getLogger("slipstream")
_SHORTEST = 0.1  # seconds that a commit has, where beginning has used up the time; 0 would be for ever


@dataclasses.dataclass(frozen=True)
class Pushed:
    """Weights that were committed by transaction `number`. `file` is where they still are, or None."""

    number: int
    update: str
    begin: wire.BeginMessage
    checksums: list[int]
    file: SharedFile | None


class Pushes:
    """The last weights of the policy (False) and of the reference model (True).

    Args:
        numbers: Of transactions.
    """

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self._last: dict[bool, Pushed] = {}

    def note(self, pushed: Pushed) -> None:
        """These are the last ones."""
        self._last[pushed.begin.reference] = pushed

    def forget_file(self, reference: bool) -> None:
        """From here on the last ones are not in shared memory any more."""
        pushed = self._last.get(reference)
        if pushed is not None:
            self._last[reference] = dataclasses.replace(pushed, file=None)

    def missed_by(self, replica: Replica) -> list[Pushed]:
        """Those that it does not hold."""
        return [pushed for kind, pushed in self._last.items() if replica.holds.get(kind, 0) != pushed.number]

    async def settle(self, replica: Replica, timeout: float, give: bool = True) -> None:
        """Give a replica what it misses, where that is in shared memory, and note what it still misses.

        Args:
            timeout: Seconds for all of it; the policy leaves the reference half of it.
            give: False only notes.

        Raises:
            ReplicaLost: it does not answer, or cannot say what it holds.
            NoFilesLeft: it was not asked.
        """
        end = time.monotonic() + timeout
        missed = self.missed_by(replica) if give else []
        for index, pushed in enumerate(missed):
            if pushed.file is not None:
                share = (end - time.monotonic()) / (len(missed) - index)
                try:
                    await self._give(replica, pushed, time.monotonic() + share)
                except ReplicaRefused as error:
                    log.error("%s cannot be given version %d: %s", replica.name, pushed.begin.version, error)
        await replica.refresh(_left(end))
        replica.missed = ", ".join(
            f"it has not got version {pushed.begin.version} of the "
            f"{'reference' if pushed.begin.reference else 'policy'}'s weights"
            for pushed in self.missed_by(replica)
        )

    async def _give(self, replica: Replica, pushed: Pushed, deadline: float) -> None:
        number = next(self._numbers)
        begin = order(number, pushed.update, pushed.begin, pushed.file)
        await replica.call("POST", "/weights/begin", begin, None, _left(deadline))
        left = _left(deadline)
        commit = wire.ReplicaCommit(transaction=number, checksums=pushed.checksums, timeout=left)
        await replica.call("POST", "/weights/commit", commit, wire.CommitReply, left)
        replica.holds[pushed.begin.reference] = pushed.number


def order(number: int, update: str, begin: wire.BeginMessage, file: SharedFile | None) -> wire.ReplicaBegin:
    """What replicas are told of a transaction."""
    path = str(file.path) if file else ""
    return wire.ReplicaBegin(transaction=number, update=update, begin=begin, path=path, offset=OFFSET)


def _left(deadline: float) -> float:
    return max(_SHORTEST, deadline - time.monotonic())
