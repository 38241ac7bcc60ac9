"""The key-value store through which the processes of a group find each other, on the server's own port behind its key.

torch.distributed's TCPStore would listen on every interface for anybody. This one is a dictionary of byte strings with
waiting; `weights.transports.group.HttpStore` is its other side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from slipstream.serving.wire import MSGPACK, Message, decode, encode

if TYPE_CHECKING:
    from fastapi import FastAPI

ROUTE = "/communicator/store"
MOST_KEYS = 100_000
MOST_BYTES = 64 << 20  # of all values
LONGEST_WAIT = 3600.0
_Key = Annotated[str, msgspec.Meta(max_length=512)]
_Value = Annotated[bytes, msgspec.Meta(max_length=1 << 20)]


class StoreMessage(Message):
    """Body of `POST /communicator/store`.

    Attributes:
        call: What to do, as torch.distributed.Store names it.
        keys: Several for `wait` and `check`, else one.
        value: For `set`; for `compare_set` the new value.
        expected: For `compare_set`.
        amount: For `add`.
        timeout: Seconds that `get` and `wait` wait for their keys.
    """

    call: Literal["set", "get", "add", "check", "wait", "compare_set", "delete_key"]
    keys: Annotated[list[_Key], msgspec.Meta(min_length=1, max_length=4096)]
    value: _Value = b""
    expected: _Value = b""
    amount: int = 0
    timeout: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_WAIT)] = 0.0


class StoreReply(Message):
    """Answer: `value` of `get` and `compare_set`, `number` of `add`, `missing` keys of `check`, `wait` and `get`."""

    value: bytes = b""
    number: int = 0
    missing: list[str] = msgspec.field(default_factory=list)


class Store:
    """Byte strings by key, in one event loop."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    async def call(self, message: StoreMessage) -> StoreReply:
        """Do what `message` says.

        Raises:
            ValueError: the value of a counter is no number, or the store is full.
        """
        if message.call in ("get", "wait"):
            missing = await self._wait(message.keys, message.timeout)
            value = b"" if missing or message.call == "wait" else self._values[message.keys[0]]
            return StoreReply(value=value, missing=missing)
        if message.call == "check":
            return StoreReply(missing=self._missing(message.keys))
        reply = self._write(message)
        async with self._changed:
            self._changed.notify_all()
        return reply

    def drop(self, prefix: str) -> None:
        """Forget all keys that begin with `prefix`: the group's, when it is left."""
        for key in [key for key in self._values if key.startswith(prefix)]:
            del self._values[key]

    def _write(self, message: StoreMessage) -> StoreReply:
        key = message.keys[0]
        if message.call == "delete_key":
            return StoreReply(number=int(self._values.pop(key, None) is not None))
        if key not in self._values and len(self._values) >= MOST_KEYS:
            raise ValueError(f"the store holds {MOST_KEYS} keys; it takes no more")
        if message.value and sum(map(len, self._values.values())) + len(message.value) > MOST_BYTES:
            raise ValueError(f"the store takes no more than {MOST_BYTES} bytes")
        if message.call == "add":
            try:
                number = int(self._values.get(key, b"0")) + message.amount
            except ValueError:
                raise ValueError(f"add: the value of {key!r} is not a number") from None
            self._values[key] = str(number).encode()
            return StoreReply(number=number)
        if message.call == "set":
            self._values[key] = message.value
            return StoreReply()
        # compare_set, as torch.distributed has it: an absent key is set if nothing is expected of it.
        held = self._values.get(key)
        if held == message.expected or (held is None and not message.expected):
            self._values[key] = message.value
        return StoreReply(value=self._values.get(key, message.expected))

    def _missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key not in self._values]

    async def _wait(self, keys: Sequence[str], timeout: float) -> list[str]:
        """Wait for keys; returns those that are still missing."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: not self._missing(keys))
        except TimeoutError:
            pass  # what is missing is the answer
        return self._missing(keys)


def add_store_route(app: FastAPI, store: Store) -> None:
    """Serve `store` at `POST /communicator/store`. The app's own middleware asks for the key."""
    from fastapi import Request, Response

    async def call(request: Request) -> Response:
        try:
            message = decode(await request.body(), StoreMessage, request.headers.get("content-type", MSGPACK))
            reply = await store.call(message)
        except ValueError as error:
            return Response(msgspec.json.encode({"detail": str(error)}), status_code=400, media_type="application/json")
        return Response(encode(reply), media_type=MSGPACK)

    # `from __future__ import annotations` hides the local names from FastAPI, which would take them for parameters.
    call.__annotations__ = {"request": Request, "return": Response}
    app.add_api_route(ROUTE, call, methods=["POST"], response_model=None)
