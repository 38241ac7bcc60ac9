"""Starts a real `slipstream vllm-serve` for a test, on a free loopback port, and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

KEY = "a-key-for-the-tests-of-slipstream"
START_SECONDS = 120
# Small enough that an engine starts in seconds on a shared CPU.
OPTIONS = ("--host", "127.0.0.1", "--port", "0", "--dtype", "float32", "--max-model-len", "256")
T = TypeVar("T")


@dataclass
class Server:
    """A running server: where it listens, its key, its process and the file that its output goes to."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def children(self) -> list[psutil.Process]:
        """Every process under the server's, replicas first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """The processes of its replicas, in the order in which they were started."""
        return sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.create_time())

    def replica(self, index: int) -> psutil.Process:
        """The process that is replica `index` now."""
        [found] = [child for child in self.replicas() if " ".join(child.cmdline()).endswith(f"/{index}.sock")]
        return found

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def stop(self, timeout: float = 60) -> int:
        """End it as an operator would, by SIGTERM; its exit code. Nothing of it is left afterwards.

        Raises:
            AssertionError: it, or a process that it had started, had to be killed.
        """
        children = self.children() if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end in {timeout} s:\n{self.output()}") from None
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(timeout)
            left = psutil.wait_procs(children, timeout=60)[1]
            for child in left:
                child.kill()
            assert not left


def start_server(
    model: str | Path,
    *options: str | int | float | Path,
    key: str | None = KEY,
    env: dict[str, str] | None = None,
    wait: bool = True,
    timeout: float = START_SECONDS,
) -> Server:
    """Start `slipstream vllm-serve --model model options...` and wait until `/health` says that it serves.

    Args:
        key: Given to it as SLIPSTREAM_API_KEY; None lets it make one (set XDG_STATE_HOME in `env`), which is read from
            its file.
        env: Further environment variables.
        wait: False returns as soon as it listens, before a replica is ready.
        timeout: Seconds that it may take.

    Raises:
        AssertionError: it ended or was not ready in time; its output is the message.
    """
    # Named by this process, so that logs of two test runs do not meet.
    log = Path(tempfile.gettempdir()) / f"slipstream-test-{os.getpid()}-{time.monotonic_ns()}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
    environment.pop("SLIPSTREAM_API_KEY", None)
    if key is not None:
        environment["SLIPSTREAM_API_KEY"] = key
    command = [sys.executable, "-m", "slipstream", "vllm-serve", "--model", model, *OPTIONS, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    server = Server("", key or "", process, log)
    try:
        server.url = until(lambda: _address(server), timeout, server)
        if key is None:
            file = re.search(r"key: (\S.*)", server.output())
            assert file is not None, server.output()
            server.key = Path(file[1]).read_text().strip()
        if wait:
            until(lambda: healthy(server), timeout, server)
    except BaseException:
        if process.poll() is None:
            server.stop()
        raise
    return server


def until(condition: Callable[[], T], timeout: float, server: Server, alive: bool = True) -> T:
    """The first true value of `condition`, asked ten times a second; AssertionError with the server's output if none
    comes, or if the server ends while it must be `alive`."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if alive and server.process.poll() is not None:
            raise AssertionError(f"the server ended with code {server.process.returncode}:\n{server.output()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain; the server's output:\n{server.output()}")
        time.sleep(0.1)


def account(server: Server, patience: float = 5) -> str:
    """Whether it runs, once one that is ending has had `patience` seconds for that, and its output."""
    try:
        state = f"ended with code {server.process.wait(patience)}"
    except subprocess.TimeoutExpired:
        state = "runs"
    return f"the server {state}:\n{server.output()}"


def healthy(server: Server) -> bool:
    """Whether `/health` answers 200."""
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _address(server: Server) -> str:
    found = re.search(r"listening on (http://\S+)", server.output())
    return found[1] if found else ""
