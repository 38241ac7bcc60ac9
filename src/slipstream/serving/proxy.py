"""The OpenAI routes, passed on to a replica as they are."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import HTTPException, Request
from starlette.responses import Response
from yarl import URL

from slipstream.serving.asking import NoFilesLeft, ReplicaLost, check_files, refusal
from slipstream.serving.limits import Limits, check_openai
from slipstream.serving.replica_process import Replica
from slipstream.serving.replicas import Replicas
from slipstream.serving.streaming import PATIENCE_SECONDS, StreamedResponse

log = logging.getLogger("slipstream")
# Of one connection, or between client and server: the replica has neither to do with them nor with the key.
_OWN_HEADERS = {
    "authorization", "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization", "te",
    "trailer", "transfer-encoding", "upgrade", "date", "server",
}  # fmt: skip
_ATTEMPTS = 3


async def forward(request: Request, replicas: Replicas, limits: Limits) -> Response:
    """The answer of the least busy replica; of another if it dies before it answers.

    Raises:
        HTTPException: 503 or 409, no replica serves; 404, the path leaves /v1; 400 or 413, the body is wrong, or asks
            for more than `limits`.
    """
    path, query = request.scope["path"], request.scope["query_string"].decode("latin-1")
    # Quoted anew: what was quoted twice must not become a ".." that the replica, or the URL, then follows.
    url = URL.build(scheme="http", host="replica", path=path, query_string=query)
    if ".." in path.split("/") or not url.path.startswith("/v1/"):
        raise HTTPException(404, "there is no such route")
    body = await request.body()
    target = replicas.serving()
    if request.method == "POST":
        check_openai(body, limits, max(r.report.max_model_len for r in target if r.report is not None))
    for attempt in range(1, _ATTEMPTS + 1):
        replica = min(target, key=lambda found: found.running)
        incarnation = replica.incarnation
        try:
            return await _ask(replica, request, url, body)
        except NoFilesLeft as error:
            raise refusal(error) from error
        except ReplicaLost as error:
            replicas.suspect(replica, incarnation)
            if attempt == _ATTEMPTS:
                raise HTTPException(503, str(error)) from error
            target = await replicas.serving_soon()
    raise AssertionError("unreachable")


async def _ask(replica: Replica, request: Request, url: URL, body: bytes) -> Response:
    check_files(replica)
    call = _Call(replica)
    try:
        async with replica.lost_as_error(f"{request.method} {url.path}"):
            call.answer = await replica.session.request(
                request.method, url, data=body or None, headers=_kept(request.headers.items())
            )
            headers = _kept(call.answer.headers.items())
            if call.answer.status == 200:
                return _Forwarded(call, headers)
            content = await call.answer.read()
        call.close()
        return Response(content, call.answer.status, headers)
    except BaseException:
        call.close()
        raise


def _kept(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _OWN_HEADERS}


class _Call:
    """One request that a replica is busy with."""

    def __init__(self, replica: Replica) -> None:
        self.answer: Any = None
        self._replica = replica
        self._incarnation = replica.incarnation
        self._open = True
        replica.running += 1

    def close(self) -> None:
        if self._open and self._replica.incarnation == self._incarnation:
            self._replica.running -= 1
        self._open = False
        if self.answer is not None:
            self.answer.close()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        async with self._replica.lost_as_error("all of a request"):
            async for piece in self.answer.content.iter_any():
                yield piece


class _Forwarded(StreamedResponse):
    """A replica's answer, passed on as it comes."""

    def __init__(self, call: _Call, headers: dict[str, str]) -> None:
        super().__init__(call.pieces(), headers, PATIENCE_SECONDS)
        self._call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ReplicaLost as error:  # the connection is closed, which is all that a client can be told now
            log.warning("%s; an answer to an OpenAI client is cut off", error)
        finally:
            self._call.close()
