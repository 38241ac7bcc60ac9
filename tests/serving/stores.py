"""A store behind a key, served on a free port of the loopback by a thread of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from slipstream.serving.store import Store, add_store_route

KEY = "a-key"


@contextmanager
def store_server() -> Iterator[tuple[str, Store]]:
    """Yield its URL and the store."""
    app, store = FastAPI(), Store()

    @app.middleware("http")
    async def check_key(request: Request, call_next):
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"detail": "wrong key"}, 401)
        return await call_next(request)

    add_store_route(app, store)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", store
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
