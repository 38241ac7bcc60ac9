"""One call to generate, spread over replicas: a prompt's completions stay together, and those of a dead replica are
asked for again elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import HTTPException

from slipstream.serving import wire
from slipstream.serving.asking import NoFilesLeft, ReplicaLost, refusal
from slipstream.serving.replica_process import Replica
from slipstream.serving.replicas import Replicas
from slipstream.serving.share import Part, Share
from slipstream.serving.streaming import PATIENCE_SECONDS, StreamedResponse

log = logging.getLogger("slipstream")
MOST_LOSSES = 3  # replicas that one call may lose; a request that kills them is not run for ever
_QUEUED = 64  # pieces that wait for a slow client before replicas have to


class Answer:
    """The answer to one call, merged from shares.

    Args:
        replicas: Of the server.
        message: The call, already checked.
    """

    def __init__(self, replicas: Replicas, message: wire.GenerateMessage) -> None:
        self._replicas = replicas
        self._message = message
        self._wanted = message.version, message.update
        self._shares: list[Share] = []
        self._losses = 0
        self._rendered: set[int] = set()
        self._ready: list[bytes] = []
        self._frames = 0
        self._came, self._taken = asyncio.Event(), asyncio.Event()
        self._reading: asyncio.Task[bytes] | None = None

    async def open(self) -> None:
        """Ask replicas; returns when all have taken their shares.

        Raises:
            HTTPException: one refuses, or none serves.
        """
        parts = [Part(index, 0, prompt) for index, prompt in enumerate(self._message.prompts)]
        try:
            await self._open(parts, self._replicas.serving(*self._wanted))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop what is unfinished."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        for share in self._shares:
            share.close()
        self._shares = []

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The frames of all shares as they come, then an end frame, or an error frame."""
        self._reading = asyncio.create_task(self._read_all())
        self._reading.add_done_callback(lambda _: self._came.set())
        while not self._reading.done() or self._ready:
            await self._came.wait()
            self._came.clear()
            ready, self._ready = self._ready, []
            self._taken.set()
            if ready:
                yield b"".join(ready)
        yield self._reading.result()

    async def _open(self, parts: list[Part], targets: list[Replica]) -> list[Share]:
        opened: list[Share] = []
        while parts:
            shares = [Share(replica, mine) for replica, mine in _assign(parts, targets).items()]
            self._shares += shares
            results = await asyncio.gather(*(share.open(self._message) for share in shares), return_exceptions=True)
            parts = []
            for share, result in zip(shares, results, strict=True):
                if isinstance(result, ReplicaLost):
                    parts += self._lose(share, result)
                elif isinstance(result, NoFilesLeft):
                    raise refusal(result) from result
                elif isinstance(result, BaseException):
                    raise result
                else:
                    opened.append(share)
            if parts:
                targets = await self._replicas.serving_soon(*self._wanted)
        return opened

    def _lose(self, share: Share, error: ReplicaLost) -> list[Part]:
        """Give up a share; what is left of it."""
        share.close()
        self._shares.remove(share)
        self._replicas.suspect(share.replica, share.incarnation)
        self._losses += 1
        if self._losses > MOST_LOSSES:
            raise HTTPException(503, f"{self._losses} replicas were lost over this request, at last: {error}")
        return [rest for part in share.parts for rest in part.rest()]

    async def _read_all(self) -> bytes:
        """Read all shares to their ends; returns the last frame."""
        try:
            async with asyncio.TaskGroup() as group:
                for share in self._shares:
                    group.create_task(self._read(share, group))
        except ExceptionGroup as errors:
            known, other = errors.split((HTTPException, wire.StreamError))
            if other is not None or known is None:
                raise
            error = known.exceptions[0]
            if isinstance(error, HTTPException):
                return wire.error_frame(error.status_code, error.detail)
            assert isinstance(error, wire.StreamError)
            return wire.error_frame(error.status, str(error))
        return wire.end_frame(self._frames)

    async def _read(self, share: Share, group: asyncio.TaskGroup) -> None:
        try:
            async for piece, frames in share.pieces(self._rendered):
                self._frames += frames
                self._ready.append(piece)
                self._came.set()
                while len(self._ready) > _QUEUED:
                    self._taken.clear()
                    await self._taken.wait()
        except ReplicaLost as error:
            parts = self._lose(share, error)
            log.warning("%s; %d completions are asked for again", error, sum(part.prompt.n for part in parts))
            if parts:
                for again in await self._open(parts, await self._replicas.serving_soon(*self._wanted)):
                    group.create_task(self._read(again, group))


class AnswerResponse(StreamedResponse):
    """Sends an answer. Whatever happens, nothing of it runs on afterwards."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.frames(), {"content-type": wire.FRAMES}, PATIENCE_SECONDS)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()


def _assign(parts: list[Part], replicas: list[Replica]) -> dict[Replica, list[Part]]:
    """Each prompt to the replica with the fewest completions under way; all parts of one prompt to the same."""
    load = {replica: replica.running for replica in replicas}
    shares: dict[Replica, list[Part]] = {}
    for _, same in itertools.groupby(parts, key=lambda part: part.index):
        group = list(same)
        replica = min(load, key=load.__getitem__)
        load[replica] += sum(part.prompt.n for part in group)
        shares.setdefault(replica, []).extend(group)
    return shares
