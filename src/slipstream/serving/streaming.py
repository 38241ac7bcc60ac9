"""Answers that are sent while they are made, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

logger = logging.getLogger("slipstream")
T = TypeVar("T")
PATIENCE_SECONDS = 600.0  # in which a client must take a piece of its answer


async def while_there(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away. The request's body has been read.

    Raises:
        ClientDisconnect: the client has gone.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if working.cancelled():
        raise ClientDisconnect
    return working.result()


class StreamedResponse(Response):
    """An answer in pieces, sent as they come. The iterator is closed however sending ends.

    Starlette's own notices that a client has gone when it sends the next piece, which may be minutes later.

    Args:
        pieces: The answer.
        headers: Its headers, as pairs of name and value.
        patience: Seconds in which the client must take a piece, or be given up: others may wait for the end of its
            answer. None: it may take any time.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], headers: dict[str, str], patience: float | None = None
    ) -> None:
        super().__init__()
        self._pieces = pieces
        self._patience = patience
        self.raw_headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the answer."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._pieces.aclose()
        if not sending.cancelled() and not sending.result():
            logger.warning("a client has taken nothing of its answer for %s s and is given up", self._patience)

    async def _send(self, send: Any) -> bool:
        """Whether the client has taken everything in time."""
        async with contextlib.aclosing(self._events()) as events:
            async for event in events:
                try:
                    async with asyncio.timeout(self._patience):
                        await send(event)
                except TimeoutError:
                    return False
        return True

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        yield {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async for piece in self._pieces:
            yield {"type": "http.response.body", "body": piece, "more_body": True}
        yield {"type": "http.response.body", "body": b"", "more_body": False}


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
