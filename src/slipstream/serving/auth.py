"""Who may come in: a bearer key on every route but `GET /health`, and where the key is kept.

The key is SLIPSTREAM_API_KEY, or one that a server makes at start and keeps, while it runs, in a file that only its
user can read. Clients of the same user on the same machine find it there.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import msgspec

VARIABLE = "SLIPSTREAM_API_KEY"
SHORTEST = 16  # characters of a key that somebody chose
OPEN = ("GET", "/health")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware that answers 401 to every request without `Authorization: Bearer <key>`, but `GET /health`.

    It stands before the routes, so that unknown paths and generated documentation are closed as well, and no body is
    read. The key is compared in constant time and never logged.
    """

    def __init__(self, app: App, key: str) -> None:
        self.app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            detail = f"send the server's key: 'Authorization: Bearer <key>'; it is in {VARIABLE} or the server's file"
            await answer_error(send, 401, detail, (b"www-authenticate", b"Bearer"))
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allowed(self, scope: Scope) -> bool:
        if scope["type"] == "http" and (scope["method"], scope["path"]) == OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return hmac.compare_digest(key, self._key) and scheme.lower() == b"bearer"


async def answer_error(send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
    """Send an error to a request whose body is not read: the connection ends with it."""
    body = msgspec.json.encode({"detail": detail})
    fixed = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def check_key(key: str) -> str:
    """`key`, if it may protect a server.

    Raises:
        ValueError: it is empty, short, or holds what a header cannot carry.
    """
    if len(key) < SHORTEST:
        raise ValueError(
            f"{VARIABLE} has {len(key)} characters: a key needs {SHORTEST} or more. Unset it, and the server makes one."
        )
    return check_characters(key)


def check_characters(key: str) -> str:
    """`key`, if a header can carry it: what sends headers would show it in its own error.

    Raises:
        ValueError: it cannot.
    """
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{VARIABLE}: a key is made of printable ASCII characters without spaces, and has no line break at its end."
        )
    return key


class KeyFile:
    """A key made for one run of a server, in a file that its user alone can read.

    Args:
        port: The server's; there is one file a port.
    """

    def __init__(self, port: int) -> None:
        self.key = secrets.token_urlsafe(32)
        self.path = key_path(port)
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        # Written under another name first: a client reads a whole key or none.
        new = self.path.with_suffix(f".{os.getpid()}")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.key)
        new.replace(self.path)

    def remove(self) -> None:
        """Delete the file, unless another server on this port has written its own since."""
        if self.path.exists() and self.path.read_text() == self.key:
            self.path.unlink()


def key_path(port: int) -> Path:
    """Where a server on `port` of this machine keeps its key. Home folders may be shared between machines."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # As the XDG specification has it, a relative path is ignored.
    home = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return home / "slipstream" / f"{socket.gethostname()}-{port}.key"


def find_key(host: str, port: int) -> str | None:
    """The key for a server: SLIPSTREAM_API_KEY, or what a server of this user on this machine has written.

    A server makes a new key whenever it starts, so ask again after one has come back.

    Args:
        host: Name or address of the server; the file is read only if it is this machine.

    Returns:
        The key, or None if there is none to be found.

    Raises:
        PermissionError: The file can be read or written by others, or belongs to another user.
    """
    key = os.environ.get(VARIABLE)
    if key:
        return key
    path = key_path(port)
    if not path.is_file() or not is_local(host):
        return None
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            found = file.read()
    except FileNotFoundError:  # its server has just ended
        return None
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(
            f"{path} must belong to you and be closed to others (mode 600), but has owner {status.st_uid} and mode "
            f"{stat.S_IMODE(status.st_mode):o}: its key is not used. Delete it and restart the server."
        )
    return found


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine: one that a socket can be bound to."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                return False
    return bool(found)
