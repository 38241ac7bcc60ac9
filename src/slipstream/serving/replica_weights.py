"""Weight updates in a replica: begun, staged beside generation, committed in a pause, or dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from slipstream.serving import machine, wire
from slipstream.serving.asking import OTHERS
from slipstream.serving.replica_generation import Generation
from slipstream.serving.shared_file import SharedFile
from slipstream.serving.worker import ERROR, FAILED, OK, REFUSED
from slipstream.vllm_compat import async_engine
from slipstream.vllm_compat.mixture import POLICY, REFERENCE
from slipstream.weights.layout import layout

logger = logging.getLogger(__name__)
# Of a commit's time, for tensors to arrive and for running requests to end, where it waits for them. The rest is for
# loading: who waits for the answer kills a replica that gives none.
_SHARE = 0.8
_SHORTEST_LOOK, _LONGEST_LOOK = 0.002, 0.05  # seconds between two looks whether they have arrived


class Refused(Exception):
    """An update that the replica does not take: what served before still does. `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Patience:
    """How long a commit waits for others: less than the `timeout` seconds for which its own answer is waited for."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._seconds = timeout, _SHARE * timeout
        self._deadline = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds until it ends; below 0 afterwards."""
        return self._deadline - time.monotonic()

    def __str__(self) -> str:
        return f"within {self._seconds:g} s, of {self._timeout:g} s that an update has (--update-timeout)"


class Weights:
    """The versions of a replica's weights, and the transaction that makes a new one.

    Args:
        engine: vLLM's asynchronous engine.
        generation: Told of every switch.
        reference: Whether the engine has a reference model.

    Attributes:
        version: Version of the policy that serves; None while none does.
        update: Name of the update that brought it; empty before the first.
        stale: Why none does.
        shares_memory, shares_loopback: Whether all workers share this machine's memory, and its loopback.
    """

    def __init__(self, engine: Any, generation: Generation, reference: bool) -> None:
        self._engine = engine
        self._generation = generation
        self._has_reference = reference
        self._why_no_reference = "no weights of the reference have come yet; send them (update_reference) first"
        self._lock = asyncio.Lock()
        self._open: wire.ReplicaBegin | None = None
        self.version: int | None = 0
        self.update = ""
        self.stale = ""
        self.shares_memory = self.shares_loopback = True

    async def look_around(self) -> None:
        """Find out whether the workers are on this machine."""
        path, nonce = "", b"none"
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(contextlib.closing(SharedFile(0)))
                file.allocate()
                file.renew()
                path, nonce = str(file.path), file.nonce
            except OSError as error:
                logger.warning("there is no shared memory here, so that weights need a process group: %s", error)
            found = await self.call("shares", path, nonce)
        self.shares_memory = all(seen for seen, _ in found)
        self.shares_loopback = all(name == machine.loopback() for _, name in found)

    def serving(self, version: int | None, mixture: float, update: str | None = None) -> int:
        """The version that serves a request for `version` of `update` (None: any) with this share of the reference.

        Raises:
            Refused: another one serves, or none, or there is no reference.
        """
        if self.version is None:
            raise Refused(409, self.stale)
        if version not in (None, self.version):
            raise Refused(409, f"version {version} of the weights is asked for, but version {self.version} serves")
        if update not in (None, self.update):
            raise Refused(409, OTHERS.format(version=self.version))
        if mixture > 0 and self._why_no_reference:
            raise Refused(409, f"mixture={mixture!r}: {self._why_no_reference}")
        return self.version

    async def begin(self, message: wire.ReplicaBegin) -> None:
        """Open a transaction, in place of an unfinished one: compare what will be sent with what is needed.

        Raises:
            Refused: it does not fit.
            ValueError: a tensor is of a type or shape that cannot be sent.
        """
        begin = message.begin
        for name, value, allowed in (("mode", begin.mode, wire.MODES), ("transport", begin.transport, wire.TRANSPORTS)):
            if value not in allowed:
                raise Refused(400, f"{name}={value!r} is not one of {', '.join(allowed)}")
        if begin.reference and not self._has_reference:
            raise Refused(400, "this server has no reference model: start it with --reference")
        if begin.transport != "group" and not self.shares_memory:
            raise Refused(409, machine.APART.format(transport=begin.transport))
        layout(begin.tensors)
        specs = [(spec.name, spec.dtype, spec.shape) for spec in begin.tensors]
        async with self._lock:
            self._open = None
            # One call: each waits for the end of a step.
            grouped = begin.transport == "group"
            try:
                await self.call("begin", specs, REFERENCE if begin.reference else POLICY, grouped)
            except BaseException:
                await self.call("abort")  # other workers than the one that refused may have begun to receive
                raise
            self._open = message

    async def commit(self, message: wire.ReplicaCommit) -> wire.CommitReply:
        """Make the staged weights those that serve.

        Raises:
            Refused: they are not what was sent, have not come in time, or the transaction is not open; the old ones
                serve. With status 500: loading failed half way, and none serve, or no reference does.
        """
        patience = Patience(message.timeout)
        async with self._lock:
            transaction = self._transaction(message.transaction)
            self._open = None
            try:
                begin = time.perf_counter()
                await self._staged(transaction, message.checksums, patience)
                logger.debug("weights: waited %.4f s for what is still to arrive", time.perf_counter() - begin)
                return await self._switch(transaction, patience)
            except BaseException:
                await self.call("abort")  # loading drops what was staged
                raise

    async def abort(self, message: wire.AbortMessage) -> None:
        """Drop what was staged for a transaction. One that is not open has nothing to drop."""
        async with self._lock:
            if self._open is not None and self._open.transaction == message.transaction:
                self._open = None
                await self.call("abort")

    async def join(self, message: wire.ReplicaCommunicator) -> None:
        """Have the workers join a process group; returns before they have, since the trainer joins after the answer."""
        await self.call(
            "join", message.backend, message.store_url, message.api_key, message.group, message.first_rank,
            message.world_size, message.timeout,
        )  # fmt: skip

    async def leave(self) -> None:
        """Have the workers leave the process group."""
        await self.call("leave")

    async def call(self, verb: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker's `Receiver`; returns their answers.

        Raises:
            Refused: A worker refused (400), or failed (500).
        """
        answers = await self._engine.collective_rpc("slipstream", args=(verb, *arguments))
        for kind, status in ((FAILED, 500), (ERROR, 500), (REFUSED, 400)):
            told = list(dict.fromkeys(text for found, text in answers if found == kind))
            if told:
                if verb == "load" and any(found in (OK, FAILED) for found, _ in answers):
                    status = 500  # workers hold different weights
                raise Refused(status, "; ".join(told))
        return [value for _, value in answers]

    def _transaction(self, number: int) -> wire.ReplicaBegin:
        if self._open is None or self._open.transaction != number:
            found = "none is" if self._open is None else f"transaction {self._open.transaction} is"
            raise Refused(409, f"transaction {number} is not open: {found}; begin again")
        return self._open

    async def _staged(self, transaction: wire.ReplicaBegin, checksums: list[int], patience: Patience) -> None:
        """Wait until every worker has all tensors, and has found them to be those that were sent."""
        if transaction.begin.transport != "group":
            await self.call("read", transaction.path, transaction.offset)
        look = _SHORTEST_LOOK
        while not all(await self.call("arrived", checksums)):
            if patience.left <= 0:
                raise Refused(409, f"the tensors have not all arrived {patience}")
            await asyncio.sleep(look)
            look = min(2 * look, _LONGEST_LOOK)

    async def _switch(self, transaction: wire.ReplicaBegin, patience: Patience) -> wire.CommitReply:
        begin, stopped = transaction.begin, time.perf_counter()
        no_time = patience.left <= 0
        try:
            try:
                await asyncio.wait_for(async_engine.pause(self._engine, begin.mode), max(0.0, patience.left))
            except TimeoutError:
                kept = "generation could not be stopped" if begin.mode == "keep" else "running requests have not ended"
                late = f"the tensors came too late for the engine to load them {patience}"
                raise Refused(409, late if no_time else f"{kept} {patience}") from None
            logger.debug("weights: the engine paused after %.4f s", time.perf_counter() - stopped)
            if begin.mode == "wait":
                stopped = time.perf_counter()  # until here, requests went on
            try:
                await self.call("load")
                logger.debug("weights: loaded %.4f s after generation stopped", time.perf_counter() - stopped)
                if not await self._engine.reset_prefix_cache():
                    raise RuntimeError("vLLM could not reset its prefix cache")
            except BaseException as error:
                # Only a refusal comes before anything is touched.
                if not isinstance(error, Refused) or error.status == 500:
                    await self._lose(begin, str(error))
                raise
            if begin.reference:
                self._why_no_reference = ""
            else:
                self.version, self.update, self.stale = begin.version, transaction.update, ""
                try:
                    await self._generation.switched(begin.version)
                except BaseException as error:
                    await self._lose(begin, f"which tokens came before it is not known: {error}")
                    raise
        finally:
            await self._engine.resume_generation()
        serves = begin.version if self.version is None else self.version
        paused = time.perf_counter() - stopped
        return wire.CommitReply(version=serves, paused_seconds=paused, update=transaction.update)

    async def _lose(self, begin: wire.BeginMessage, why: str) -> None:
        """Nobody knows what the engine holds: what it has begun with it is no completion of any version."""
        if begin.reference:
            self._why_no_reference = f"the last update of the reference failed ({why}); a whole one repairs it"
            logger.error("no reference serves: %s", self._why_no_reference)
        else:
            self.version = None
            self.stale = f"the last weight update failed ({why}); a whole update repairs it"
            logger.error("no weights serve: %s", self.stale)
        if not begin.reference or self._generation.mixes:
            await async_engine.abort_all(self._engine)
