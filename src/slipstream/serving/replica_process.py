"""One replica as the server sees it: a process, the socket it answers on, and what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec

from slipstream.serving import wire
from slipstream.serving.asking import NoFilesLeft, ReplicaLost, ReplicaRefused, detail_of, no_files, out_of_files
from slipstream.serving.auth import VARIABLE

M = TypeVar("M", bound=msgspec.Struct)
KEPT_LINES = 20
POLL_SECONDS = 0.1
END_SECONDS = 10.0  # between SIGTERM and SIGKILL
_PIECE = 1 << 16


class Replica:
    """A replica's process.

    Attributes:
        index: Its number, from 0.
        incarnation: How often its process has been started.
        report: What it last said of itself; None until it is up.
        known: The same, and what an earlier process of it said while this one starts.
        holds: Number of the transaction that its weights are of, of the policy (False) and of the reference (True).
        missed: Why these are not the server's; empty if they are; None before it was given what it misses.
        death: Why it is not started again; empty unless it is dead.
        running: Completions that it was asked for and has not sent.
        base: Where its routes are, for `session`.
    """

    base = "http://replica"

    def __init__(self, index: int, folder: Path, settings: dict[str, Any], environment: dict[str, str]) -> None:
        self.index = index
        self.socket = folder / f"{index}.sock"
        self.settings = settings
        self.environment = environment
        self.incarnation = 0
        self.report: wire.ReplicaReport | None = None
        self.known: wire.ReplicaReport | None = None
        self.holds: dict[bool, int] = {}
        self.missed: str | None = None
        self.death = ""
        self.running = 0
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"replica {self.index}"

    @property
    def state(self) -> str:
        """`starting`, `ready`, `stale` or `dead`."""
        if self.death:
            return "dead"
        if self.report is None or self.missed is None:
            return "starting"
        return "stale" if self.missed or self.report.state != "ready" else "ready"

    @property
    def up(self) -> bool:
        """Whether it answers, and what it holds is known: ready or stale."""
        return self.state in ("ready", "stale")

    def is_still(self, incarnation: int) -> bool:
        """Whether it is up, and the same process as it was then."""
        return self.up and self.incarnation == incarnation

    @property
    def info(self) -> wire.ReplicaInfo:
        """What the server tells others of it."""
        if self.report is None:
            return wire.ReplicaInfo(state=self.state, detail=self.death)
        return wire.ReplicaInfo(
            state=self.state, version=self.report.version, running=self.running, devices=self.report.devices,
            detail=self.missed or self.report.detail, ranks=self.report.ranks, shares_memory=self.report.shares_memory,
        )  # fmt: skip

    @property
    def session(self) -> aiohttp.ClientSession:
        """Connections to its socket. As many as there are requests; they end with the process."""
        if self._session is None:
            raise ReplicaLost(f"{self.name} is {self.state}")
        return self._session

    async def start(self) -> None:
        """Start the process. It is this thread's child and ends when this thread does (PR_SET_PDEATHSIG).

        Raises:
            NoFilesLeft: it was not started.
        """
        self.socket.unlink(missing_ok=True)
        self.incarnation += 1
        self.report, self.holds, self.missed, self.running = None, {}, None, 0
        self.lines.clear()
        environment = {**os.environ, **self.environment}
        environment.pop(VARIABLE, None)
        try:
            # Not through a pipe: one that is written to when the process has died already is an error of the event
            # loop's.
            with os.fdopen(os.memfd_create("settings"), "w+b") as settings:
                settings.write(json.dumps(self.settings).encode())
                settings.seek(0)
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "slipstream.serving.replica", "--socket", str(self.socket),
                    stdin=settings, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                    env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            if out_of_files(error):
                raise NoFilesLeft(f"start {self.name}") from error
            raise
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self.socket), limit=0),
            # Nobody knows how long completions take; a replica that hangs is found by `Replicas`, which ends it.
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            read_bufsize=1 << 20,
        )

    async def forward_output(self) -> None:
        """Copy what the process prints to standard error, each line with the replica's name, until it ends."""
        assert self.process is not None
        assert self.process.stdout is not None
        rest = b""
        while piece := await self.process.stdout.read(_PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _PIECE:
                lines, rest = [*lines, rest], b""
            self._print(lines)
        self._print([rest] if rest else [])

    def _print(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            self.lines.append(text)
            with contextlib.suppress(OSError):  # nobody reads it any more; the process must not wait for a full pipe
                print(f"[{self.name}] {text}", file=sys.stderr, flush=True)

    async def wait_until_up(self, timeout: float) -> None:
        """Wait until it answers.

        Raises:
            ReplicaLost: it ended before, or did not answer in time.
        """
        assert self.process is not None
        try:
            async with asyncio.timeout(timeout):
                while self.process.returncode is None:
                    if self.socket.exists():
                        try:
                            await self.refresh(timeout)
                        except (ReplicaLost, NoFilesLeft):  # it listens, and is not ready; or nobody has asked it
                            pass
                        else:
                            return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as error:
            raise ReplicaLost(f"it did not start within {timeout:g} s (--start-timeout)") from error
        raise ReplicaLost("it ended while it started")

    async def refresh(self, timeout: float) -> wire.ReplicaReport:
        """Ask for its report.

        Raises:
            ReplicaLost: there is none within `timeout` seconds, or an error in its place: nobody knows what it holds.
            NoFilesLeft: it was not asked.
        """
        try:
            self.report = self.known = await self.call("GET", "/info", None, wire.ReplicaReport, timeout)
        except ReplicaRefused as error:
            raise ReplicaLost(f"{self.name} cannot say what it holds: {error}") from error
        return self.report

    async def call(
        self, method: str, path: str, message: msgspec.Struct | None, kind: type[M] | None, timeout: float
    ) -> Any:
        """Send a message and return the answer, a `kind` (None: it is dropped).

        Raises:
            ReplicaRefused: the answer is an error.
            ReplicaLost: there is none within `timeout` seconds.
            NoFilesLeft: it was not asked.
        """
        limit = aiohttp.ClientTimeout(total=timeout)
        async with (
            self.lost_as_error(f"{method} {path}", timeout),
            self.open(method, path, message, timeout=limit) as answer,
        ):
            body = await answer.read()
        if answer.status >= 400:
            raise ReplicaRefused(answer.status, detail_of(body))
        return None if kind is None else wire.decode(body, kind)

    def open(self, method: str, path: str, message: msgspec.Struct | None, **options: Any) -> Any:
        """A request whose answer is read by the caller: await it, or `async with` it."""
        headers = {"content-type": wire.MSGPACK, "accept": wire.MSGPACK}
        data = None if message is None else wire.encode(message)
        return self.session.request(method, self.base + path, data=data, headers=headers, **options)

    @contextlib.asynccontextmanager
    async def lost_as_error(self, what: str, timeout: float | None = None) -> AsyncIterator[None]:
        """Raise ReplicaLost where a connection fails, or `timeout` seconds are over; NoFilesLeft where it cannot be."""
        try:
            yield
        except TimeoutError as error:
            raise ReplicaLost(f"{self.name} did not answer {what} within {timeout or 0:g} s") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            if out_of_files(error):
                raise no_files(self) from error
            raise ReplicaLost(f"{self.name} did not answer {what}: {type(error).__name__} {error}") from error

    def doubt(self) -> None:
        """It does not serve until it has answered, and was given what it misses."""
        self.report = self.missed = None

    def kill(self) -> None:
        """End the process at once; who watches it starts it again."""
        self.doubt()
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    async def end(self) -> None:
        """End the process and all that it has started: SIGTERM, and after a while SIGKILL."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), END_SECONDS)
        # Its session is its process group: what is left of it are its workers.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
