"""How a server coordinates an update, without an engine: what answers on its replicas' sockets is this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from types import SimpleNamespace

import aiohttp
import msgspec
import pytest
import torch
import uvicorn
from fastapi import HTTPException
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slipstream.serving import life_signs, replicas, transaction, wire
from slipstream.serving.asking import NoFilesLeft, ReplicaLost
from slipstream.serving.connection import LostError, ServerError
from slipstream.serving.coordinator import Coordinator
from slipstream.serving.replica_process import Replica
from slipstream.serving.settings import Settings
from slipstream.weights.transports.shared_memory import Writer, read

REPORT = wire.ReplicaReport(
    state="ready", version=0, running=0, devices=[], ranks=1, max_model_len=9, dtype="float32", vllm="0", platform="cpu"
)
SPECS = [wire.TensorSpec("weight", "float32", (4,))]


class Acted:
    """What answers in the place of a replica's process: it takes every update, until `info` is another status.

    Attributes:
        called: Path and message of every call but those for its report.
    """

    def __init__(self, replica):
        self.replica, self.info, self.called = replica, 200, []

    async def report(self, request):
        if self.info != 200:
            return JSONResponse({"detail": "the engine is confused"}, self.info)
        return Response(wire.encode(REPORT), media_type=wire.MSGPACK)

    async def start_again(self):
        """Its process ends, and another one answers, which holds nothing yet."""
        replica = self.replica
        await replica.end()
        replica.holds, replica.missed = {}, None
        replica._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(replica.socket)))

    async def take(self, request):
        self.called.append((request.url.path, msgspec.msgpack.decode(await request.body())))
        reply = wire.CommitReply(version=1, paused_seconds=0.0, update="an update")
        return Response(wire.encode(reply), media_type=wire.MSGPACK)


@contextlib.asynccontextmanager
async def acting(count, folder):
    """`count` replicas that are up, each with its `Acted` behind it. Their processes are sleeps."""
    acted, servers, tasks = [], [], []
    for index in range(count):
        replica = Replica(index, folder, {}, {})
        actor = Acted(replica)
        routes = [Route("/info", actor.report), Route("/weights/{verb}", actor.take, methods=["POST"])]
        config = uvicorn.Config(Starlette(routes=routes), uds=str(replica.socket), log_level="warning")
        servers.append(uvicorn.Server(config))
        tasks.append(asyncio.create_task(servers[-1].serve()))
        replica.process = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
        replica._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(replica.socket)))
        acted.append(actor)
    try:
        async with asyncio.timeout(60):
            while not all(server.started for server in servers):
                await asyncio.sleep(0.01)
        for actor in acted:
            await actor.replica.refresh(60)
            actor.replica.missed = ""
        yield acted
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*(actor.replica.end() for actor in acted))
        await asyncio.gather(*tasks)


TIMEOUT = 60.0


class Everybody:
    """A process group of all replicas that are up, however often they are started."""

    def members(self, up):
        return up


def coordinator(acted):
    made = Coordinator(lambda: [actor.replica for actor in acted if actor.replica.up], Everybody(), TIMEOUT)
    return contextlib.closing(made)


async def begun(coordinator, version=1, **options):
    """The number of a transaction that is open now."""
    return (await coordinator.begin(wire.BeginMessage(version=version, tensors=SPECS, **options))).transaction


def test_a_replica_that_cannot_say_what_it_holds_does_not_undo_an_update(tmp_path, caplog):
    """The others serve the new weights: the trainer is told so, and the confused one is started again."""

    async def run():
        async with acting(2, tmp_path) as acted:
            with coordinator(acted) as weights:
                number = await begun(weights)
                acted[1].info = 500
                with caplog.at_level(logging.ERROR):
                    reply = await weights.commit(wire.CommitMessage(transaction=number, checksums=[0]))
                assert (reply.version, weights.version) == (1, 1)
                assert [actor.replica.state for actor in acted] == ["ready", "starting"]
                assert await asyncio.wait_for(acted[1].replica.process.wait(), 60) != 0
                assert "replica 1" in caplog.text
                assert "the engine is confused" in caplog.text

    asyncio.run(run())


def test_a_replica_that_could_not_be_asked_is_not_killed(tmp_path, monkeypatch):
    """This process has no files left: that says nothing of the replica, which is brought up when there are some."""

    async def run():
        async with acting(2, tmp_path) as acted:
            with coordinator(acted) as weights:
                number = await begun(weights)

                async def refresh(timeout):
                    raise NoFilesLeft("ask replica 1")

                with monkeypatch.context() as patch:
                    patch.setattr(acted[1].replica, "refresh", refresh)
                    reply = await weights.commit(wire.CommitMessage(transaction=number, checksums=[0]))
                assert reply.version == 1
                assert acted[1].replica.process.returncode is None
                assert acted[1].replica.missed is None, "it is to be brought up"
                assert [actor.replica.state for actor in acted] == ["ready", "starting"]

    asyncio.run(run())


def test_a_sign_of_life_that_does_not_arrive_ends_no_update(caplog):
    answers = [LostError("out of files"), ServerError(503, "out of files"), ServerError(409, "it is closed")]

    class Unreachable:
        def call(self, *arguments):
            raise answers.pop(0)

    sign = life_signs.LifeSigns(Unreachable(), 7, seconds=0.0)
    sign()
    sign()
    assert caplog.text.count("was not told that the weight update goes on: out of files") == 2
    with pytest.raises(ServerError, match="it is closed"):
        sign()


def test_a_replica_that_cannot_say_how_it_does_counts_as_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)

    async def run():
        watching = replicas.Replicas(Settings(model="m"), None, None, None)
        async with acting(1, tmp_path) as [actor]:
            actor.info = 500
            with pytest.raises(ReplicaLost, match="replica 0 cannot say what it holds: the engine is confused"):
                await asyncio.wait_for(watching._watch(actor.replica), 60)
        await watching.stop()

    asyncio.run(run())


def test_a_trainer_that_sends_for_long_is_not_silent(tmp_path, monkeypatch):
    now = [time.monotonic()]  # a clock that goes on while the test lets it
    monkeypatch.setattr(transaction, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def run():
        async with acting(1, tmp_path) as acted:
            with coordinator(acted) as weights:
                watching = asyncio.create_task(weights.watch())
                number = await begun(weights)
                for _ in range(15):
                    await asyncio.sleep(0.1)  # weights travel
                    now[0] += transaction.SILENT_SECONDS / 2
                    weights.progress(number)
                with pytest.raises(HTTPException) as refused:
                    await begun(weights, version=2)
                assert refused.value.status_code == 423
                now[0] += TIMEOUT + 1
                async with asyncio.timeout(60):
                    while weights.transaction is not None:  # it has stopped to send
                        await asyncio.sleep(0.02)
                with pytest.raises(HTTPException, match="it was ended, or replaced by another") as refused:
                    weights.progress(number)
                assert refused.value.status_code == 409
                watching.cancel()

    asyncio.run(run())


def test_a_silent_trainer_that_goes_on_writes_into_nobody_elses_weights(tmp_path, monkeypatch):
    """Between the checksums and the loading of another's, nobody would see that these have changed."""
    now = [time.monotonic()]
    monkeypatch.setattr(transaction, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def run():
        async with acting(1, tmp_path) as acted:
            with coordinator(acted) as weights:
                message = wire.BeginMessage(version=1, tensors=SPECS)
                first = await weights.begin(message)
                stopped = Writer(first.path, first.nonce, first.offset, SPECS)
                now[0] += transaction.SILENT_SECONDS
                second = await weights.begin(message)
                sums = Writer(second.path, second.nonce, second.offset, SPECS).write([("weight", torch.ones(4))])
                [(_, arrived)] = read(second.path, second.offset, SPECS)
                stopped.write([("weight", torch.zeros(4))])
                assert arrived.tolist() == [1.0] * 4
                await weights.commit(wire.CommitMessage(transaction=second.transaction, checksums=sums))
                third = await weights.begin(message)
                assert third.path == second.path != first.path  # one that was committed is used again
                assert not os.path.exists(first.path)

    asyncio.run(run())


def test_replicas_know_how_long_the_server_waits_for_them(tmp_path):
    async def run():
        async with acting(1, tmp_path) as [actor]:
            with coordinator([actor]) as weights:
                number = await begun(weights)
                await weights.commit(wire.CommitMessage(transaction=number, checksums=[0]))
                await actor.start_again()
                await weights.bring_up(actor.replica)
                assert actor.replica.state == "ready"
        commits = [message["timeout"] for path, message in actor.called if path == "/weights/commit"]
        assert commits[0] == TIMEOUT
        assert 0 < commits[1] < TIMEOUT  # less what its begin has taken

    asyncio.run(run())


def test_a_replica_that_lacks_the_reference_is_told_of_with_the_next_update(tmp_path):
    """What came through a process group is kept nowhere, and a trainer sends its reference once."""

    async def run():
        async with acting(2, tmp_path) as acted:
            with coordinator(acted) as weights:

                async def push(version, reference=False):
                    number = await begun(weights, version, transport="group", reference=reference)
                    return await weights.commit(wire.CommitMessage(transaction=number, checksums=[0]))

                assert not (await push(1)).reference_missing
                assert not (await push(0, reference=True)).reference_missing
                await acted[1].start_again()
                await weights.bring_up(acted[1].replica)
                states = [actor.replica.state for actor in acted]
                assert states == ["ready", "stale"]
                assert (await push(2)).reference_missing
                assert acted[1].replica.missed == "it has not got version 0 of the reference's weights"
                assert not (await push(0, reference=True)).reference_missing
                assert [actor.replica.state for actor in acted] == ["ready", "ready"]

    asyncio.run(run())
