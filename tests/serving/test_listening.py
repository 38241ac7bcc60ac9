"""Whoever reaches the port can hold neither its connections nor its memory without a key."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from slipstream.serving import launch, listening

HEADERS = b"GET / HTTP/1.1\r\nhost: here\r\n"
LOOKS = 4  # of the deadline, while an answer is made


@pytest.fixture(params=[HttpToolsProtocol, H11Protocol])
def port(request, monkeypatch):
    """Where a server answers once the deadline for headers has passed several times."""
    monkeypatch.setattr(listening, "HEADERS_SECONDS", 0.05)
    looked = asyncio.Event()
    looks = 0

    class Watched(listening.InTime, request.param):
        def _close_if_nothing_came(self, waited, last):
            nonlocal looks
            looks += 1
            if looks >= LOOKS:
                looked.set()
            super()._close_if_nothing_came(waited, last)

    async def app(scope, receive, send):
        nonlocal looks
        looks = 0
        looked.clear()
        await asyncio.wait_for(looked.wait(), 60)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(app, http=Watched, lifespan="off", log_config=None, timeout_keep_alive=60)
    server = uvicorn.Server(config)
    listener = launch.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def connection(port):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as made:
        yield made


def read_answer(connection):
    data = b""
    while not data.endswith(b"\r\n\r\nok"):
        more = connection.recv(4096)
        assert more, f"closed after {data!r}"
        data += more
    return data


@pytest.mark.parametrize("begin", [b"", b"GET", HEADERS])
def test_headers_that_do_not_come_end_a_connection(connection, begin):
    connection.sendall(begin)
    assert connection.recv(1) == b""


def test_a_request_in_time_is_answered_however_long_that_takes_and_the_next_one_must_come_in_time_too(connection):
    connection.sendall(HEADERS + b"\r\n")
    assert read_answer(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(HEADERS)
    assert connection.recv(1) == b""


def test_a_server_does_not_keep_headers_without_end(server):
    line = b"x-more: " + b"a" * 1000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(HEADERS)
        with contextlib.suppress(ConnectionError):
            for _ in range(100_000):
                connection.sendall(line)
            pytest.fail("100 MB of headers were taken")
