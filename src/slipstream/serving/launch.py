"""From settings to a running server: its port, its key, and what it prints."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import resource
import signal
import socket

import uvicorn

from slipstream.serving import auth
from slipstream.serving.app import Server, make_app
from slipstream.serving.listening import HttpConnection
from slipstream.serving.machine import url_of
from slipstream.serving.settings import Settings
from slipstream.serving.shared_file import remove_abandoned
from slipstream.version import __version__

log = logging.getLogger("slipstream")
_GRACE_SECONDS = 3  # between SIGTERM and the end of answers that are being sent
_BACKLOG = 2048
_FILES = 65_536  # that may be open; often 1024 are allowed to a process that asks for no more


def serve(settings: Settings) -> None:
    """Run a server until it is told to end.

    Raises:
        ValueError: a setting is wrong, or needs a package that is not installed.
        OSError: the port is taken, or the address is not this machine's.
        RuntimeError: no replica could be started.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s: %(message)s")
    check_ray(settings)
    given = os.environ.get(auth.VARIABLE)
    key = None if given is None else auth.check_key(given)
    listener = listen(settings.host, settings.port)
    key_file = auth.KeyFile(listener.getsockname()[1]) if key is None else None
    try:
        _run(settings, listener, key_file.key if key_file is not None else str(key), key_file)
    finally:  # the server has removed it, unless it never began, or a second Ctrl-C cut off its end
        if key_file is not None:
            key_file.remove()


def _run(settings: Settings, listener: socket.socket, key: str, key_file: auth.KeyFile | None) -> None:
    port = listener.getsockname()[1]
    server = Server(settings, _store_url(settings, port), key, key_file)
    allow_many_files()
    removed = remove_abandoned()
    if removed:
        log.info("removed %d files of weights that servers had left in shared memory", removed)
    print(f"slipstream vllm-serve {__version__}: {settings.model}")
    workers = f"{settings.workers} worker{'s' * (settings.workers > 1)}"
    split = f"tensor-parallel {settings.tensor_parallel_size} x data-parallel {settings.data_parallel_size}"
    print(f"starting {workers} ({split})")
    print(f"key: {key_file.path if key_file is not None else f'from {auth.VARIABLE}'}")
    print(f"listening on {url_of(settings.host, port)}", flush=True)
    config = uvicorn.Config(
        make_app(server, key), log_config=None, log_level=settings.log_level, access_log=settings.log_level == "debug",
        lifespan="on", ws="none", http=HttpConnection, timeout_graceful_shutdown=_GRACE_SECONDS, server_header=False,
    )  # fmt: skip
    server.runner = uvicorn.Server(config)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # its terminal is closed; under nohup it goes on
        signal.signal(signal.SIGHUP, server.runner.handle_exit)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C; everything has ended with the lifespan
        server.runner.run(sockets=[listener])
    if server.failure:
        raise RuntimeError(f"no replica could be started: {server.failure}")


def check_ray(settings: Settings) -> None:
    """Raise ValueError if Ray is to run the workers and is not installed: vLLM's own error comes late, and is long."""
    if settings.distributed_executor_backend != "ray":
        return
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # a folder of that name
        raise ValueError(
            "distributed_executor_backend='ray' needs the package ray, which is not installed here: pip install ray, "
            "on every machine that is to have workers."
        )


def allow_many_files() -> None:
    """Let this process, and the replicas that it starts, have as many connections as requests: two files each."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything else, so that a taken port is found at once.

    Raises:
        OSError: the port is taken, or the address is not this machine's; the message says so.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on port {port} of {host}: {error.strerror}. Choose another by --port; 0 takes a free one."
        ) from error
    return listener


def _store_url(settings: Settings, port: int) -> str:
    """Where replicas reach the rendezvous store."""
    host = settings.host
    if host in ("0.0.0.0", "::", ""):
        host = "::1" if host == "::" else "127.0.0.1"
    return url_of(host, port)
