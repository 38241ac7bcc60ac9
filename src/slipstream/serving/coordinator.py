"""Weights reach all replicas or none: transactions over them, and a file in shared memory that the weights come in."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from fastapi import HTTPException

from slipstream.serving import wire
from slipstream.serving.asking import NoFilesLeft, ReplicaLost, ask_all, worst
from slipstream.serving.communicator import Communicator
from slipstream.serving.pushes import Pushed, Pushes, order
from slipstream.serving.replica_process import Replica
from slipstream.serving.shared_file import OFFSET, SharedFiles
from slipstream.serving.transaction import SILENT_SECONDS, Transaction, check_begin

log = logging.getLogger("slipstream")


class Coordinator:
    """The weights of a server.

    The policy's and the reference model's (`reference` is False and True) have a file each, which lasts from one update
    to the next. What was committed stays there, for replicas that are started again, until the next update begins.

    Args:
        up: Gives the replicas that answer.
        communicator: The process group that weights may come through.
        timeout: Seconds that a step may take, and that an open transaction may be silent.

    Attributes:
        version: Version that serves; 0 is what the replicas have loaded.
        transaction: The open one.
    """

    def __init__(self, up: Callable[[], list[Replica]], communicator: Communicator, timeout: float) -> None:
        self.version = 0
        self.transaction: Transaction | None = None
        self._up = up
        self._communicator = communicator
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._pushes = Pushes(self._numbers)
        self._files = SharedFiles()
        self._lock = asyncio.Lock()  # one exchange with the replicas at a time

    async def begin(self, message: wire.BeginMessage) -> wire.BeginReply:
        """Open a transaction on all replicas.

        Raises:
            HTTPException: 409, another is open, or no process group is; 400, a replica cannot take such weights; 503,
                none is up; 507, shared memory is full.
        """
        size = check_begin(message)
        async with self._lock:
            await self._make_way()
            grouped = message.transport == "group"
            members = self._communicator.members(self._up()) if grouped else self._up()
            if not members:
                raise HTTPException(503, "no replica is up to take weights")
            file = None if grouped else self._files.choose(message.reference, size)
            number = next(self._numbers)
            self.transaction = Transaction(number, message, {r: r.incarnation for r in members}, file)
            try:
                told = order(number, self.transaction.update, message, file)
                _, failed = await ask_all(members, "/weights/begin", told, self._timeout)
                if failed:
                    raise worst(failed)
                if file is not None:
                    self._pushes.forget_file(message.reference)
                    await self._files.use(message.reference, file)
            except BaseException:
                await self._drop(self.transaction)
                raise
            self.transaction.heard_now()
            if file is None or message.transport == "body":
                return wire.BeginReply(transaction=number)
            return wire.BeginReply(transaction=number, path=str(file.path), nonce=file.nonce, offset=OFFSET)

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Put a piece of a `body` transaction's bytes at `offset` of its layout.

        Raises:
            HTTPException: 409, no such transaction is open; 400, the bytes lie outside of it.
        """
        transaction = self.opened(number)
        if transaction.begin.transport != "body" or transaction.file is None:
            raise HTTPException(409, f"transaction {number} is one of transport {transaction.begin.transport!r}")
        transaction.heard_now()
        try:
            transaction.file.write(offset, data)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    def progress(self, number: int) -> None:
        """A transaction's trainer sends its weights, where the server does not see them.

        Raises:
            HTTPException: 409, no such transaction is open.
        """
        self.opened(number).heard_now()

    async def commit(self, message: wire.CommitMessage) -> wire.CommitReply:
        """Let the replicas load what was sent, all at the same time.

        Raises:
            HTTPException: none of them has; the old weights go on serving.
        """
        async with self._lock:
            transaction = self.opened(message.transaction)
            begin, members = transaction.begin, transaction.present()
            self.transaction = None  # nothing can be written to it any more
            told = wire.ReplicaCommit(
                transaction=transaction.number, checksums=message.checksums, timeout=self._timeout
            )
            replies, failed = await ask_all(members, "/weights/commit", told, self._timeout, wire.CommitReply)
            if replies:
                self._pushes.note(
                    Pushed(transaction.number, transaction.update, begin, message.checksums, transaction.file)
                )
                if not begin.reference:
                    self.version = begin.version
            for replica in replies:
                replica.holds[begin.reference] = transaction.number
            for replica, error in failed.items():
                log.error("%s has not taken version %d: %s", replica.name, begin.version, error)
            # All at the same time, so that the trainer's deadline holds.
            await asyncio.gather(*(self._settle(replica, give=replica not in failed) for replica in self._up()))
            reference_missing = any(p.begin.reference for r in self._up() for p in self._pushes.missed_by(r))
        if not replies:
            raise worst(failed) if failed else HTTPException(409, "every replica ended after begin: begin again")
        paused = max(reply.paused_seconds for reply in replies.values())
        return wire.CommitReply(
            version=self.version, paused_seconds=paused, update=transaction.update, reference_missing=reference_missing
        )

    async def abort(self, number: int) -> bool:
        """Abort a transaction; False if it is not open (any more)."""
        async with self._lock:
            if self.transaction is None or self.transaction.number != number:
                return False
            await self._drop(self.transaction)
            return True

    async def connect(self, message: wire.CommunicatorMessage, address: str) -> wire.CommunicatorReply:
        """Make a process group for a trainer; see `Communicator.connect`."""
        async with self._lock:
            await self._make_way()
            return await self._communicator.connect(message, self._up(), address)

    async def disconnect(self) -> None:
        """End the process group, and an update that comes through it."""
        async with self._lock:
            if self.transaction is not None and self.transaction.begin.transport == "group":
                await self._drop(self.transaction)
            await self._communicator.disconnect()

    def opened(self, number: int) -> Transaction:
        """The open transaction.

        Raises:
            HTTPException: 409, it is not the one of this number.
        """
        if self.transaction is None or self.transaction.number != number:
            now = "none is" if self.transaction is None else f"{self.transaction.number} is"
            raise HTTPException(409, f"transaction {number} is not open ({now}): it was ended, or replaced by another")
        return self.transaction

    async def bring_up(self, replica: Replica) -> None:
        """Give a replica that was started again the weights of the others, if they are in shared memory.

        Raises:
            ReplicaLost: it has died.
            NoFilesLeft: it was not asked.
        """
        async with self._lock:
            await self._pushes.settle(replica, self._timeout)

    async def lost(self, replica: Replica) -> None:
        """A replica has died: if no other has begun the open transaction, it is over."""
        async with self._lock:
            if self.transaction is not None and not self.transaction.present():
                log.warning("transaction %d is over: %s has died", self.transaction.number, replica.name)
                await self._drop(self.transaction)

    async def watch(self) -> None:
        """Drop transactions that are silent for too long, for ever."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            async with self._lock:
                if self.transaction is not None and self.transaction.silence > self._timeout:
                    log.warning("transaction %d is dropped: silent for %.0f s", self.transaction.number, self._timeout)
                    await self._leave_behind(self.transaction)

    def close(self) -> None:
        """Remove the files."""
        self._files.close()

    async def _make_way(self) -> None:
        """Drop the open transaction if its trainer is silent; HTTPException 423 if it is not."""
        old = self.transaction
        if old is None:
            return
        if old.active:
            raise HTTPException(
                423,
                f"version {old.begin.version} is being sent (transaction {old.number}, last heard of "
                f"{old.silence:.0f} s ago); who begins after {SILENT_SECONDS:.0f} s of its silence takes its place",
            )
        log.warning("transaction %d, silent for %.0f s, is dropped for another", old.number, old.silence)
        await self._leave_behind(old)

    async def _leave_behind(self, transaction: Transaction) -> None:
        """Drop one whose trainer is silent. It may be stopped in the middle of a tensor, and go on to write it."""
        await self._drop(transaction)
        if transaction.file is not None:
            self._files.leave_behind(transaction.begin.reference, transaction.file)

    async def _drop(self, transaction: Transaction) -> None:
        """Let the members forget what they have staged. The old weights go on serving."""
        self.transaction = None
        message = wire.AbortMessage(transaction=transaction.number)
        _, failed = await ask_all(transaction.present(), "/weights/abort", message, self._timeout)
        for replica, error in failed.items():
            log.warning("%s has not aborted transaction %d: %s", replica.name, transaction.number, error)
        if transaction.file is not None:
            self._files.release(transaction.begin.reference, transaction.file)

    async def _settle(self, replica: Replica, give: bool) -> None:
        """Give a replica what it misses; one that cannot say what it holds then is started again."""
        try:
            await self._pushes.settle(replica, self._timeout, give)
        except NoFilesLeft as error:
            # It says nothing of the replica, which may have missed this update: who watches it brings it up.
            log.error("%s is asked again later: %s", replica.name, error)
            replica.doubt()
        except ReplicaLost as error:
            log.error("%s is started again: %s", replica.name, error)
            replica.kill()
