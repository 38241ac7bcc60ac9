"""The rendezvous store of a process group, kept by the generation server behind its key."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import httpx
import torch.distributed as dist

from slipstream.serving.store import ROUTE, StoreMessage, StoreReply
from slipstream.serving.wire import MSGPACK, decode, encode


class HttpStore(dist.Store):
    """A `torch.distributed.Store` whose values are at the server (`serving.store`).

    Args:
        url: Of the server.
        api_key: The key to it.
        prefix: Of all keys, so that groups do not meet.
        timeout: Seconds to wait for a key.
    """

    def __init__(self, url: str, api_key: str, prefix: str, timeout: float) -> None:
        super().__init__()
        self.url, self.seconds, self._prefix = url.rstrip("/"), timeout, prefix
        headers = {"authorization": f"Bearer {api_key}", "content-type": MSGPACK, "accept": MSGPACK}
        self._client = httpx.Client(headers=headers, trust_env=False)

    def set(self, key: str, value: str | bytes) -> None:
        """Store a value."""
        self._call("set", [key], value=_bytes(value))

    def get(self, key: str) -> bytes:
        """The value of a key, once it is there. Raises TimeoutError if it does not come."""
        reply = self._call("get", [key], timeout=self.seconds)
        self._none_missing(reply, self.seconds)
        return reply.value

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return once all keys are there. Raises TimeoutError if they do not come."""
        seconds = self.seconds if timeout is None else timeout.total_seconds()
        self._none_missing(self._call("wait", list(keys), timeout=seconds), seconds)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return not self.missing(keys)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those keys that are not there."""
        return [key.removeprefix(self._prefix) for key in self._call("check", list(keys)).missing]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns its new value."""
        return self._call("add", [key], amount=amount).number

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Store a value if the key has the expected one; returns what it has afterwards."""
        return self._call("compare_set", [key], expected=_bytes(expected), value=_bytes(value)).value

    def delete_key(self, key: str) -> bool:
        """Forget a key; returns whether it was there."""
        return bool(self._call("delete_key", [key]).number)

    def close(self) -> None:
        """Close the connections to the server."""
        self._client.close()

    def _call(self, call: Any, keys: Sequence[str], *, timeout: float = 0.0, **fields: Any) -> StoreReply:
        message = StoreMessage(call=call, keys=[self._prefix + key for key in keys], timeout=timeout, **fields)
        try:
            answer = self._client.post(self.url + ROUTE, content=encode(message), timeout=timeout + 30.0)
        except httpx.TransportError as error:
            raise ConnectionError(f"the server at {self.url} does not answer ({error})") from error
        if answer.status_code != 200:
            raise ConnectionError(f"the server at {self.url} answered {answer.status_code}: {answer.text[:300]}")
        return decode(answer.content, StoreReply)

    def _none_missing(self, reply: StoreReply, seconds: float) -> None:
        if reply.missing:
            names = ", ".join(key.removeprefix(self._prefix) for key in reply.missing)
            raise TimeoutError(f"{names} did not come to the store within {seconds:g} s")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
