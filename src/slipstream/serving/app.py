"""The server of `slipstream vllm-serve`: its routes, and its life. It imports neither torch nor vLLM."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from slipstream.serving import auth, wire
from slipstream.serving.asking import ask_all, worst
from slipstream.serving.communicator import Communicator
from slipstream.serving.coordinator import Coordinator
from slipstream.serving.limits import BodyLimit, Limits, check_generate, read_message
from slipstream.serving.proxy import forward
from slipstream.serving.replicas import Replicas
from slipstream.serving.router import Answer, AnswerResponse
from slipstream.serving.schema import described, use_schema
from slipstream.serving.settings import Settings
from slipstream.serving.store import Store, add_store_route
from slipstream.serving.streaming import while_there
from slipstream.version import __version__

MESSAGES: list[type[msgspec.Struct]] = [
    wire.GenerateMessage, wire.ServerInfo, wire.CommunicatorMessage, wire.CommunicatorReply, wire.BeginMessage,
    wire.BeginReply, wire.ProgressMessage, wire.CommitMessage, wire.CommitReply, wire.AbortMessage,
]  # fmt: skip
_DIGITS = 19  # that a number in a query may have; Python reads no more than some thousand


class Server:
    """What the routes have in common.

    Args:
        settings: Of the server.
        store_url: Where replicas reach the server's rendezvous store.
        key: That requests must have.
        key_file: Removed at the end; None if the key is the user's.

    Attributes:
        runner: Told to end if no replica can be started; `failure` is why, then.
    """

    def __init__(self, settings: Settings, store_url: str, key: str, key_file: auth.KeyFile | None) -> None:
        self.settings = settings
        self.key_file = key_file
        self.limits = Limits(
            settings.max_prompts, settings.max_completions, settings.max_request_tokens, settings.reference
        )
        self.store = Store()
        communicator = Communicator(self.store, store_url, key, settings.update_timeout)
        self.coordinator = Coordinator(lambda: self.replicas.up, communicator, settings.update_timeout)
        self.replicas = Replicas(settings, self.coordinator.bring_up, self.coordinator.lost, self.give_up)
        self.failure = ""
        self.runner: uvicorn.Server | None = None

    def give_up(self) -> None:
        """End the server: none of its replicas could be started."""
        self.failure = self.replicas.reason()
        if self.runner is not None:
            self.runner.should_exit = True

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the replicas; end them, and remove all files, when the server ends."""
        watch = asyncio.create_task(self.coordinator.watch())
        self.replicas.start()
        try:
            yield
        finally:
            watch.cancel()
            await self.replicas.stop()
            self.coordinator.close()
            if self.key_file is not None:
                self.key_file.remove()

    async def health(self) -> Response:
        """Whether a replica answers; needs no key, and says no more."""
        states = {replica.state for replica in self.replicas.all}
        for state in ("ready", "stale"):
            if state in states:
                return JSONResponse({"status": state})
        raise HTTPException(503, "starting" if "starting" in states else "no replica serves; see the server's log")

    async def server_info(self, request: Request) -> Response:
        """What is served, and how its replicas are."""
        report = next((replica.known for replica in self.replicas.all if replica.known is not None), None)
        if report is None:
            raise HTTPException(503, self.replicas.reason())
        transaction = self.coordinator.transaction
        info = wire.ServerInfo(
            slipstream=__version__,
            vllm=report.vllm,
            model=self.settings.model,
            dtype=report.dtype,
            max_model_len=report.max_model_len,
            tensor_parallel_size=self.settings.tensor_parallel_size,
            data_parallel_size=self.settings.data_parallel_size,
            version=self.coordinator.version if self.replicas.ready else None,
            platform=report.platform,
            replicas=[replica.info for replica in self.replicas.all],
            transaction=transaction.number if transaction is not None else None,
            reference=self.settings.reference,
            update_timeout=self.settings.update_timeout,
        )
        return _reply(request, info)

    async def generate(self, request: Request) -> Response:
        """Sample completions. The answer is a stream of frames, one a completion, as soon as it is finished."""
        message = await read_message(request, wire.GenerateMessage)
        check_generate(message, self.limits)
        answer = Answer(self.replicas, message)
        await while_there(request.receive, answer.open())  # it may wait for its turn
        return AnswerResponse(answer)

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Empty the replicas' caches of prompts."""
        self.replicas.serving()
        failed = (await ask_all(self.replicas.up, "/reset_prefix_cache", None, self.settings.update_timeout))[1]
        if failed:
            raise worst(failed)
        return JSONResponse({})

    async def connect(self, request: Request) -> Response:
        """Make a process group for a trainer, which is rank 0, and the workers of all replicas."""
        message = await read_message(request, wire.CommunicatorMessage)
        address, _ = request.scope.get("server") or ("", None)
        return _reply(request, await self.coordinator.connect(message, address))

    async def disconnect(self) -> Response:
        """End the process group."""
        await self.coordinator.disconnect()
        return JSONResponse({})

    async def begin(self, request: Request) -> Response:
        """Announce new weights; every worker checks that they fit before anything is sent."""
        return _reply(request, await self.coordinator.begin(await read_message(request, wire.BeginMessage)))

    async def body(self, request: Request) -> Response:
        """Send a piece of the announced weights' bytes, for clients that share no memory with the server."""
        transaction, offset = (_query(request, name) for name in ("transaction", "offset"))
        async for data in request.stream():
            self.coordinator.write(transaction, offset, data)
            offset += len(data)
        return JSONResponse({})

    async def progress(self, request: Request) -> Response:
        """Say that weights are on their way where the server does not see them. Silent updates make way for others."""
        self.coordinator.progress((await read_message(request, wire.ProgressMessage)).transaction)
        return JSONResponse({})

    async def commit(self, request: Request) -> Response:
        """Load the weights that were sent. Until then, and if it fails, the old ones serve."""
        return _reply(request, await self.coordinator.commit(await read_message(request, wire.CommitMessage)))

    async def abort(self, request: Request) -> Response:
        """Drop the weights that were sent. A transaction that is not open (any more) is no error."""
        message = await read_message(request, wire.AbortMessage)
        return JSONResponse({"aborted": await self.coordinator.abort(message.transaction)})

    async def openai(self, request: Request) -> Response:
        """vLLM's OpenAI-compatible routes."""
        await request.body()
        return await while_there(request.receive, forward(request, self.replicas, self.limits))


def make_app(server: Server, key: str) -> Any:
    """The server's ASGI app, behind its key and its limits."""
    app = FastAPI(
        title="Slipstream", version=__version__, lifespan=server.lifespan,
        description="Completions out, weights in. Bodies may be msgpack instead of JSON, and so may answers be.",
    )  # fmt: skip
    weights = (400, 409, 503)
    for method, path, route, description in (
        ("GET", "/health", server.health, described(None, None, 503, needs_key=False)),
        ("GET", "/server_info", server.server_info, described(None, wire.ServerInfo, 503)),
        ("POST", "/generate", server.generate, described(wire.GenerateMessage, wire.FRAMES, 409, 503)),
        ("POST", "/reset_prefix_cache", server.reset_prefix_cache, described(None, None, 409, 503)),
        (
            "POST", "/communicator", server.connect,
            described(wire.CommunicatorMessage, wire.CommunicatorReply, *weights, 423),
        ),
        ("DELETE", "/communicator", server.disconnect, described()),
        ("POST", "/weights/begin", server.begin, described(wire.BeginMessage, wire.BeginReply, *weights, 423, 507)),
        ("POST", "/weights/progress", server.progress, described(wire.ProgressMessage, None, 409)),
        ("POST", "/weights/commit", server.commit, described(wire.CommitMessage, wire.CommitReply, *weights)),
        ("POST", "/weights/abort", server.abort, described(wire.AbortMessage)),
    ):  # fmt: skip
        app.add_api_route(path, route, methods=[method], **description)
    app.add_api_route("/weights/body", server.body, methods=["PUT"], include_in_schema=False)
    app.add_api_route("/v1/{path:path}", server.openai, methods=["GET", "POST"], include_in_schema=False)
    add_store_route(app, server.store)
    app.routes[-1].include_in_schema = False  # type: ignore[attr-defined]
    use_schema(app, MESSAGES)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(RecursionError, _too_deep)
    app.add_middleware(BodyLimit, limit=server.settings.max_body_size << 20)
    app.add_middleware(auth.Guard, key=key)  # the last one added is asked first
    return app


def _reply(request: Request, message: msgspec.Struct) -> Response:
    if wire.MSGPACK in request.headers.get("accept", ""):
        return Response(wire.encode(message), media_type=wire.MSGPACK)
    return Response(msgspec.json.encode(message), media_type=wire.JSON)


def _query(request: Request, name: str) -> int:
    value = request.query_params.get(name, "")
    if not value.isdecimal() or len(value) > _DIGITS:
        raise HTTPException(
            400, f"{name}={value[:_DIGITS]!r} is not allowed: it must be an integer >= 0 of at most {_DIGITS} digits"
        )
    return int(value)


async def _too_deep(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the body is nested too deeply"}, 400)


async def _gone(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the client has gone"}, 400)  # nobody reads it
