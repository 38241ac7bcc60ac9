"""Connections that anybody may open: what comes before a request's headers are whole has a deadline and a size."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:
    Protocol = object

HEADERS_SECONDS = 30
HEADERS_BYTES = 256 << 10


class InTime(Protocol):
    """Closes a connection of uvicorn's if a request's headers do not come, or do not end.

    uvicorn lets them take any time and memory, and keys are in headers: whoever reaches the port could hold all
    connections without one.
    """

    _look: asyncio.TimerHandle | None = None
    _unused = 0

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._look_later()

    def data_received(self, data: bytes) -> None:
        """Read on, unless there is too much that belongs to no request."""
        before = self.cycle
        super().data_received(data)
        self._unused = self._unused + len(data) if self._waits() and self.cycle is before else 0
        if self._unused > HEADERS_BYTES:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def _waits(self) -> bool:
        """Whether there is no request that has to be answered."""
        return self.cycle is None or self.cycle.response_complete

    def _look_later(self) -> None:
        self._look = self.loop.call_later(HEADERS_SECONDS, self._close_if_nothing_came, self._waits(), self.cycle)

    def _close_if_nothing_came(self, waited: bool, last: Any) -> None:
        if waited and self._waits() and self.cycle is last:
            self.transport.close()
        else:
            self._look_later()


class HttpConnection(InTime, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection of the server's."""
