"""Replicas are kept alive: started, watched, and started again when they die, with what they need to go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import HTTPException

from slipstream.serving.asking import OTHERS, NoFilesLeft, ReplicaLost
from slipstream.serving.replica_process import Replica
from slipstream.serving.settings import Settings

log = logging.getLogger("slipstream")
WATCH_SECONDS = 5.0  # between two questions how a replica does
HANG_SECONDS = 120.0  # without an answer, after which it counts as dead
OUTPUT_SECONDS = 5.0  # to read the rest of what a dead replica has printed
QUICK_SECONDS = 60.0  # a replica that lived no longer died quickly
QUICK_DEATHS = 3  # in a row, after which it stays dead


class Replicas:
    """All replicas of a server.

    Args:
        settings: The server's.
        bring_up: Called with a replica that has come up before it serves: gives it the server's weights.
        lost: Called with a replica that has died.
        hopeless: Called once no replica will ever serve, since none could start.
    """

    def __init__(
        self,
        settings: Settings,
        bring_up: Callable[[Replica], Awaitable[None]],
        lost: Callable[[Replica], Awaitable[None]],
        hopeless: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._bring_up = bring_up
        self._lost = lost
        self._hopeless = hopeless
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-")  # of mode 0700
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        options = settings.replica()
        self.all = [
            Replica(index, Path(self._folder.name), options, environment)
            for index, environment in enumerate(device_slices(settings))
        ]

    def start(self) -> None:
        """Begin to start and watch them."""
        self._tasks = [asyncio.create_task(self._keep(replica)) for replica in self.all]
        for task in self._tasks:
            task.add_done_callback(self._check)

    async def stop(self) -> None:
        """End them all. Nothing of them is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.end() for replica in self.all))
        self._folder.cleanup()

    @property
    def up(self) -> list[Replica]:
        """Those that answer: ready or stale."""
        return [replica for replica in self.all if replica.up]

    @property
    def ready(self) -> list[Replica]:
        """Those that serve."""
        return [replica for replica in self.all if replica.state == "ready"]

    def reason(self) -> str:
        """Why none serves, or what each does."""
        return "; ".join(
            f"{replica.name} is {info.state}" + (f": {info.detail}" if info.detail else "")
            for replica, info in ((replica, replica.info) for replica in self.all)
        )

    def suspect(self, replica: Replica, incarnation: int) -> None:
        """Take a replica that broke a connection for dead until it answers again."""
        if replica.incarnation == incarnation:
            replica.doubt()
            self.changed()

    def changed(self) -> None:
        """Tell those who wait in `serving` that a replica's state is another."""
        self._changed.set()
        self._changed = asyncio.Event()

    def serving(self, version: int | None = None, update: str | None = None) -> list[Replica]:
        """Replicas that serve `version`, brought by `update` (None: any).

        Raises:
            HTTPException: 503, none serves; 409, they wait for weights, or have others.
        """
        ready = self.ready
        if not ready:
            stale = any(replica.state == "stale" for replica in self.all)
            raise HTTPException(409 if stale else 503, self.reason())
        found = [r for r in ready if version is None or (r.report is not None and r.report.version == version)]
        if not found:
            have = sorted({r.report.version for r in ready if r.report is not None and r.report.version is not None})
            serves = " and ".join(map(str, have))
            raise HTTPException(409, f"version {version} of the weights is asked for, but version {serves} serves")
        found = [r for r in found if update is None or (r.report is not None and r.report.update == update)]
        if not found:
            raise HTTPException(409, OTHERS.format(version=version))
        return found

    async def serving_soon(self, version: int | None = None, update: str | None = None) -> list[Replica]:
        """As `serving`, but waits while none serves and one is starting.

        Raises:
            HTTPException: as `serving`.
        """
        deadline = time.monotonic() + self._settings.start_timeout
        while True:
            changed = self._changed
            starting = any(replica.state == "starting" for replica in self.all)
            if self.ready or not starting or time.monotonic() > deadline:
                return self.serving(version, update)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), max(0.0, deadline - time.monotonic()))

    async def _keep(self, replica: Replica) -> None:
        """Start a replica, watch it, and start it again, until it dies too often."""
        quick = 0
        was_up = False
        while not replica.death:
            started = time.monotonic()
            try:
                await replica.start()
            except NoFilesLeft as error:
                log.error("%s is started later: %s", replica.name, error)
                await asyncio.sleep(WATCH_SECONDS)
                continue
            output = asyncio.create_task(replica.forward_output())
            try:
                try:
                    await replica.wait_until_up(self._settings.start_timeout)
                    try:
                        await self._bring_up(replica)
                    except NoFilesLeft:
                        replica.doubt()  # `_watch` brings it up when there are files again
                    log.info("%s is %s after %.1f s", replica.name, replica.state, time.monotonic() - started)
                    was_up = True
                    self.changed()
                    cause = await self._watch(replica)
                except ReplicaLost as error:
                    cause = str(error)
            except BaseException:
                output.cancel()
                raise
            lived = time.monotonic() - started
            replica.doubt()
            await replica.end()
            # Whatever holds its output open has left its process group.
            await asyncio.wait([output], timeout=OUTPUT_SECONDS)
            output.cancel()
            quick = quick + 1 if lived < QUICK_SECONDS else 0
            # What cannot start the first time will not start the next time: a wrong option, a model that is not there.
            if not was_up or quick >= QUICK_DEATHS:
                replica.death = f"{cause}; its last lines:\n" + "\n".join(replica.lines)
            log.error("%s has died after %.0f s: %s", replica.name, lived, cause)
            await self._lost(replica)
            self.changed()
        if all(other.death and other.incarnation == 1 for other in self.all):
            self._hopeless()

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.critical("a replica is no longer watched", exc_info=task.exception())
            self._hopeless()

    async def _watch(self, replica: Replica) -> str:
        """Wait until the process ends; why it did.

        Raises:
            ReplicaLost: it does not answer, or cannot say how it does, which counts as ended.
        """
        assert replica.process is not None
        while True:
            try:
                code = await asyncio.wait_for(replica.process.wait(), WATCH_SECONDS)
                return f"its process ended with code {code}"
            except TimeoutError:
                state = replica.state
                with contextlib.suppress(NoFilesLeft):  # ask again later
                    await replica.refresh(HANG_SECONDS)
                    if replica.missed is None:  # doubted: it may have missed an update meanwhile
                        state = "doubted"  # be it since it was asked: then who waits has not seen it ready
                        await self._bring_up(replica)
                if replica.state != state:
                    self.changed()


def device_slices(settings: Settings) -> list[dict[str, str]]:
    """Environment variables for each replica: which of the visible devices it takes.

    Raises:
        ValueError: there are fewer devices than workers.
    """
    replicas, size = settings.data_parallel_size, settings.replica_workers
    if replicas == 1 or settings.distributed_executor_backend == "ray":
        return [{} for _ in range(replicas)]  # all that are visible; or Ray hands them out
    devices = visible_devices()
    if not devices:
        return [{} for _ in range(replicas)]
    if len(devices) < settings.workers:
        raise ValueError(
            f"--data-parallel-size {replicas} times {size} workers a replica needs {settings.workers} devices, but "
            f"{len(devices)} are visible ({', '.join(devices)}): lower one of them, or set CUDA_VISIBLE_DEVICES."
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[i * size : (i + 1) * size])} for i in range(replicas)]


def visible_devices() -> list[str]:
    """Names of the devices that CUDA_VISIBLE_DEVICES leaves visible, or numbers of all; none on a CPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    # Asked of a process of its own, for this one is to stay free of torch.
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if asked.returncode:
        raise RuntimeError(f"torch cannot count the devices: {(asked.stderr.strip() or 'no output').splitlines()[-1]}")
    return [str(index) for index in range(int(asked.stdout.split()[-1]))]
