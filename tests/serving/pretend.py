"""An HTTP server that only pretends to be one of ours."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def answering(answer) -> Iterator[tuple[int, list[str]]]:
    """A port at which `answer(handler)` answers, and the calls that came there."""
    calls: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def any(self):
            calls.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("content-length", 0)))
            answer(self)

        do_GET = do_POST = do_PUT = do_DELETE = any

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made.server_port, calls
        finally:
            made.shutdown()
            thread.join(10)
