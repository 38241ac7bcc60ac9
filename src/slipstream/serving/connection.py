"""HTTP to a generation server: where it is, the key to it, deadlines, and errors that say what to do."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import httpx
import msgspec

from slipstream.serving.auth import VARIABLE, check_characters, find_key
from slipstream.serving.wire import MSGPACK, ServerInfo, decode, encode

M = TypeVar("M", bound=msgspec.Struct)
CALL_SECONDS = 60.0  # that the server may take over a call that neither generates nor loads
_NOT_READY = (502, 503, 504)  # statuses: the server's own, and those of a proxy before one that does not answer it
_PAUSES = (0.1, 0.4)  # before a GET that failed on its way is tried again
# A machine that vanishes closes no connection: ask for a sign of life after a minute of silence, six times.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
]


class ServerError(RuntimeError):
    """The server answered with an error. `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RefusedError(ServerError, ValueError):
    """The server refused a request for what is in it (status 400, 413 or 422)."""


class LostError(ConnectionError):
    """The connection to the server could not be made, or broke."""


class Connection:
    """A server's address and the key to it. Can be used by several threads. No proxy is asked.

    Args:
        url: As `http://host:port`; 0.0.0.0 means the loopback.
        api_key: The key; None looks for it: SLIPSTREAM_API_KEY, then the file of a server of this user and machine.
        timeout: Seconds that an answer that is being generated may be silent.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"base_url={url!r} is not allowed: it must be like 'http://host:8000'.")
        if parsed.host in ("0.0.0.0", "::"):
            parsed = parsed.copy_with(host="127.0.0.1" if parsed.host == "0.0.0.0" else "::1")
        self.url = str(parsed).rstrip("/")
        self._host, self._port = parsed.host, parsed.port or (443 if parsed.scheme == "https" else 80)
        self._given_key, self.timeout = api_key, timeout
        self.key = self._found_key()
        # Idle connections are given up before the server, which does so after 5 s, can do it under a request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=2.0)
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(limits=limits, socket_options=_KEEPALIVE),
            headers={"accept": MSGPACK, "accept-encoding": "identity"},
            trust_env=False,
        )

    def wait(self, seconds: float) -> ServerInfo:
        """Wait until the server is ready; 0 asks once, and gives it 10 s to answer.

        Raises:
            ConnectionError: there is no server, or it is not ready, at the end of `seconds`.
            PermissionError: it wants another key.
        """
        deadline, pause = time.monotonic() + seconds, 0.05
        least = 1.0 if seconds > 0 else 10.0  # for an answer; that nobody listens is known at once
        while True:
            left = deadline - time.monotonic()
            last = left <= 0
            patience = min(max(left, least), 10.0)  # one that is not asked long must be able to answer all the same
            try:
                answer = self._exchange("GET", "/health", timeout=patience)
                if answer.status_code not in _NOT_READY:
                    answer = self._ask(
                        "GET", "/server_info", timeout=min(patience, max(least, deadline - time.monotonic()))
                    )
                if answer.status_code not in _NOT_READY:
                    self._check(answer, "/server_info")
                    return self._info(answer)
                reason = f"the server at {self.url} is not ready: {_detail(answer)}"
            except (LostError, TimeoutError) as error:
                reason = f"there is no server at {self.url} ({error.__cause__})"
            if last:
                waited = f" Waited {seconds:g} s for it." if seconds else ""
                raise ConnectionError(f"{reason}.{waited} {self._how_to_start()}")
            # Between two questions to what may be another machine. The last one is asked at the deadline.
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(2 * pause, 1.0)

    def get(self, path: str, kind: type[M]) -> M:
        """GET a message. Tried three times if the connection breaks."""
        for pause in (*_PAUSES, None):
            try:
                return self._message(self._call("GET", path), kind)
            except LostError:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def post(self, path: str, message: msgspec.Struct | None, kind: type[M], *, timeout: float = CALL_SECONDS) -> M:
        """POST a message, once; the answer is one, too."""
        return self._message(self._call("POST", path, message, timeout=timeout), kind)

    def call(self, method: str, path: str, message: msgspec.Struct | None = None, **options: Any) -> None:
        """Make a call once whose answer does not matter as long as it is no error. `options`: `timeout`, `content`."""
        self._call(method, path, message, **options)

    def stream(self, path: str, message: msgspec.Struct) -> Iterator[bytes]:
        """POST a message, once; yields the answer's bytes as they come. Closing the iterator ends the request."""
        shown, headers = self.key, self._headers(MSGPACK)
        try:
            with self._client.stream(
                "POST", self.url + path, content=encode(message), headers=headers, timeout=self._limits(self.timeout)
            ) as answer:
                if answer.status_code == 200:
                    yield from answer.iter_raw()
                    return
                answer.read()
                if answer.status_code != 401 or not self._found_another_key(shown):
                    self._check(answer, path)
        except httpx.TimeoutException as error:
            raise TimeoutError(f"{self.url}{path}: the server was silent for {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise self._lost(path, error) from error
        yield from self.stream(path, message)  # with the other key; nothing was done without it

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _call(
        self,
        method: str,
        path: str,
        message: msgspec.Struct | None = None,
        *,
        content: Any = None,
        timeout: float = CALL_SECONDS,
    ) -> httpx.Response:
        if message is not None:
            content = encode(message)
        answer = self._ask(method, path, content, timeout)
        self._check(answer, path)
        return answer

    def _ask(self, method: str, path: str, content: Any = None, timeout: float = CALL_SECONDS) -> httpx.Response:
        """The answer, whatever it is; with the other key, where a server that was started again has made one."""
        shown = self.key
        answer = self._exchange(method, path, content, timeout)
        if answer.status_code == 401 and self._found_another_key(shown):
            answer = self._exchange(method, path, content, timeout)  # without the key, nothing was done
        return answer

    def _exchange(self, method: str, path: str, content: Any = None, timeout: float = CALL_SECONDS) -> httpx.Response:
        kind = "application/octet-stream" if method == "PUT" else MSGPACK
        headers = self._headers(kind if content is not None else None)
        try:
            return self._client.request(
                method, self.url + path, content=content, headers=headers, timeout=self._limits(timeout)
            )
        except httpx.TimeoutException as error:
            raise TimeoutError(f"{self.url}{path}: the server did not answer within {timeout:g} s") from error
        except httpx.TransportError as error:
            raise self._lost(path, error) from error

    def _headers(self, content_type: str | None) -> dict[str, str]:
        headers = {"content-type": content_type} if content_type else {}
        return {**headers, "authorization": f"Bearer {self.key}"} if self.key else headers

    def _limits(self, seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=min(seconds, 30.0), pool=None)

    def _found_key(self) -> str | None:
        key = self._given_key or find_key(self._host, self._port)
        return check_characters(key) if key else None

    def _found_another_key(self, shown: str | None) -> bool:
        """A server that was started again has made a new key, where nobody has chosen one.

        Args:
            shown: The key that it did not accept. Another thread may have found the new one since.
        """
        self.key = self._found_key()
        return self.key != shown

    def _check(self, answer: httpx.Response, path: str) -> None:
        status, detail = answer.status_code, _detail(answer)
        if status < 400:
            return
        if status == 401:
            what = "does not accept this key" if self.key else "wants a key, and none was found"
            raise PermissionError(
                f"the server at {self.url} {what}. Give api_key, or set {VARIABLE} to what the server was started "
                "with. Without either, the key is read from a file that the server writes when it starts, for clients "
                "of the same user on the same machine."
            )
        if path == "/server_info":
            raise ConnectionError(
                f"what answers at {self.url} is not a Slipstream server ({status}: {detail}). {self._how_to_start()}"
            )
        kind = RefusedError if status in (400, 413, 422) else ServerError
        raise kind(status, f"{self.url}{path.partition('?')[0]}: {detail}")

    def _info(self, answer: httpx.Response) -> ServerInfo:
        try:
            return self._message(answer, ServerInfo)
        except ValueError as error:
            raise ConnectionError(
                f"what answers at {self.url} is not a Slipstream server, or one of another version ({error}). "
                f"{self._how_to_start()}"
            ) from error

    def _message(self, answer: httpx.Response, kind: type[M]) -> M:
        return decode(answer.content, kind, answer.headers.get("content-type", ""))

    def _lost(self, path: str, error: Exception) -> LostError:
        return LostError(
            f"{self.url}{path.partition('?')[0]}: the server does not answer, or has ended "
            f"({type(error).__name__}: {error}). {self._how_to_start()}"
        )

    def _how_to_start(self) -> str:
        return f"Start one with: slipstream vllm-serve --model MODEL --port {self._port}"


class _ErrorBody(msgspec.Struct):
    detail: Any


def _detail(answer: httpx.Response) -> str:
    """The reason that an answer gives; its text, if it is not a Slipstream server's."""
    try:
        return str(msgspec.json.decode(answer.content, type=_ErrorBody).detail)
    except msgspec.DecodeError:
        return " ".join(answer.text.split())[:300] or answer.reason_phrase
