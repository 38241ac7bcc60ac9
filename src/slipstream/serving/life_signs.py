"""Signs of life of a trainer whose weights travel past the server: in shared memory, or to the workers directly."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from slipstream.serving import wire
from slipstream.serving.connection import Connection, LostError, ServerError

logger = logging.getLogger(__name__)

CLOSED = 409  # status: there is no such update
T = TypeVar("T")
SIGN_SECONDS = 2.0  # between two signs; a trainer that is silent for 10 s makes way for another


class LifeSigns:
    """Called with each piece that was sent, it tells the server now and then that the update goes on.

    There is no thread behind it: a trainer that is stuck is to be silent.

    Args:
        connection: To the server.
        transaction: Number of the update.
        seconds: Between two signs, at least.
    """

    def __init__(self, connection: Connection, transaction: int, seconds: float = SIGN_SECONDS) -> None:
        self._connection = connection
        self._seconds = seconds
        self._message = wire.ProgressMessage(transaction=transaction)
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Something was sent. A sign that does not arrive is one that is missed: the update itself says what is wrong.

        Raises:
            ServerError: the update is not open any more (409).
        """
        if time.monotonic() - self._last < self._seconds:
            return
        try:
            self._connection.call("POST", "/weights/progress", self._message)
        except (LostError, ServerError, TimeoutError) as error:
            if isinstance(error, ServerError) and error.status == CLOSED:
                raise
            logger.warning("the server was not told that the weight update goes on: %s", error)
        self._last = time.monotonic()

    def beside(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, with a call for each."""
        for item in items:
            self()
            yield item
