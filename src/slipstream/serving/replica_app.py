"""The routes of a replica: those of `wire`, with its messages for replicas in place of what clients send.

Errors are JSON, `{"detail": "..."}`. Only the server can reach the socket, so nobody is asked for a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from slipstream.serving import wire
from slipstream.serving.replica_generation import Generation, Job
from slipstream.serving.replica_weights import Refused, Weights
from slipstream.serving.streaming import StreamedResponse, while_there
from slipstream.serving.turns import Turns, mixture_of_call
from slipstream.vllm_compat import async_engine, load, openai

logger = logging.getLogger("slipstream.replica")
M = TypeVar("M", bound=msgspec.Struct)
_LIFE_SIGN_SECONDS = 1.0  # between two looks whether the engine lives


class Replica:
    """The routes of a replica.

    Args:
        engine: vLLM's asynchronous engine.
        reference: Whether it has a reference model.
    """

    def __init__(self, engine: Any, reference: bool) -> None:
        self._engine = engine
        self._has_reference = reference
        self._generation = Generation(engine)
        self._weights = Weights(engine, self._generation, reference)
        self._turns = Turns(self._set_mixture, None if reference else 0.0)
        self._devices: list[str] = []
        self._openai = openai.app(engine)

    def app(self) -> Starlette:
        """The ASGI app; the engine ends with its lifespan."""
        routes = [
            Route("/info", self.info),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/weights/begin", self.begin, methods=["POST"]),
            Route("/weights/commit", self.commit, methods=["POST"]),
            Route("/weights/abort", self.abort, methods=["POST"]),
            Route("/communicator", self.join, methods=["POST"]),
            Route("/communicator", self.leave, methods=["DELETE"]),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]),
            Mount("/", self._openai_in_turn),
        ]
        handlers: dict[Any, Any] = dict.fromkeys(async_engine.request_errors(), _wrong)
        handlers |= {Refused: _refused, ClientDisconnect: _gone, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        watch = None
        try:
            await self._weights.look_around()
            self._devices = [device for device in await self._weights.call("device") if device]
            watch = asyncio.create_task(self._watch())
            yield
        finally:
            if watch is not None:
                watch.cancel()
            # Here, and not after the server has ended: it raises the signal that ended it once more.
            self._engine.shutdown()

    async def _watch(self) -> None:
        """End this process when the engine has died: the server starts another."""
        while not self._engine.errored:
            await asyncio.sleep(_LIFE_SIGN_SECONDS)
        logger.critical("the engine has died; the replica ends")
        os.kill(os.getpid(), signal.SIGTERM)

    async def info(self, request: Request) -> Response:
        config = self._engine.vllm_config
        return _message(
            wire.ReplicaReport(
                state="ready" if self._weights.version is not None else "stale",
                version=self._weights.version,
                update=self._weights.update,
                running=async_engine.running(self._engine),
                devices=self._devices,
                ranks=config.parallel_config.world_size,
                max_model_len=self._generation.max_model_len,
                dtype=str(config.model_config.dtype).removeprefix("torch."),
                vllm=load().__version__,
                platform=async_engine.platform(),
                detail=self._weights.stale,
                shares_memory=self._weights.shares_memory,
                shares_loopback=self._weights.shares_loopback,
            )
        )

    async def generate(self, request: Request) -> Response:
        message = await _body(request, wire.GenerateMessage)
        mixture = mixture_of_call(message, self._has_reference)
        self._weights.serving(message.version, mixture, message.update)
        turn = await while_there(request.receive, self._turns.enter(mixture))
        try:
            jobs, frames = await self._generation.begin(
                message,
                lambda: self._weights.serving(message.version, mixture, message.update),  # may have changed
            )
        except BaseException:
            turn.close()
            raise
        return FrameResponse(self._generation.stream(jobs, frames, turn), lambda: self._end(jobs, turn))

    async def _end(self, jobs: list[Job], turn: ExitStack) -> None:
        with turn:
            await self._generation.drop(jobs)

    async def _set_mixture(self, mixture: float) -> None:
        # What a client of the OpenAI routes has left may not have ended: nobody waits for it.
        await async_engine.abort_all(self._engine)
        await self._weights.call("set_mixture", mixture)

    async def begin(self, request: Request) -> Response:
        await self._weights.begin(await _body(request, wire.ReplicaBegin))
        return Response()

    async def commit(self, request: Request) -> Response:
        return _message(await self._weights.commit(await _body(request, wire.ReplicaCommit)))

    async def abort(self, request: Request) -> Response:
        await self._weights.abort(await _body(request, wire.AbortMessage))
        return Response()

    async def join(self, request: Request) -> Response:
        await self._weights.join(await _body(request, wire.ReplicaCommunicator))
        return Response()

    async def leave(self, request: Request) -> Response:
        await self._weights.leave()
        return Response()

    async def reset_prefix_cache(self, request: Request) -> Response:
        if not await self._engine.reset_prefix_cache():
            return _error(409, "the prefix cache cannot be emptied while completions are sampled")
        return Response()

    async def _openai_in_turn(self, scope: Any, receive: Any, send: Any) -> None:
        self._weights.serving(None, 0.0)
        if not self._has_reference or scope["method"] != "POST":
            await self._openai(scope, receive, send)
            return
        events = [{"type": "http.request", "body": await Request(scope, receive).body(), "more_body": False}]

        async def again() -> Any:
            return events.pop() if events else await receive()

        with await while_there(receive, self._turns.enter(0.0)):
            self._weights.serving(None, 0.0)
            await self._openai(scope, again, send)


class FrameResponse(StreamedResponse):
    """Frames, sent as they come; at the end, whatever it is, `end` is awaited."""

    def __init__(self, frames: AsyncGenerator[bytes, None], end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(frames, {"content-type": wire.FRAMES})
        self._end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()


async def _body(request: Request, kind: type[M]) -> M:
    return wire.decode(await request.body(), kind, request.headers.get("content-type", wire.MSGPACK))


def _message(message: msgspec.Struct) -> Response:
    return Response(wire.encode(message), media_type=wire.MSGPACK)


def _error(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status)


async def _refused(request: Request, error: Any) -> Response:
    return _error(error.status, str(error))


async def _gone(request: Request, error: Exception) -> Response:
    return _error(400, "the client has gone")  # nobody reads it


async def _wrong(request: Request, error: Exception) -> Response:
    return _error(400, str(error))


async def _broken(request: Request, error: Exception) -> Response:
    return _error(500, f"{type(error).__name__}: {error}")
