"""How a server's replicas are supervised, without an engine: what answers on the socket is this process."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
import pytest
import uvicorn
from fastapi import HTTPException
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from slipstream.serving import replicas, wire
from slipstream.serving.asking import ReplicaLost
from slipstream.serving.communicator import Communicator
from slipstream.serving.replica_process import Replica
from slipstream.serving.settings import Settings
from slipstream.serving.store import Store
from slipstream.serving.streaming import StreamedResponse

REPORT = wire.ReplicaReport(
    state="ready", version=2, running=0, devices=[], ranks=1, max_model_len=9, dtype="float32", vllm="0", platform="cpu"
)


async def info(request):
    return Response(wire.encode(REPORT), media_type=wire.MSGPACK)


def test_a_replica_that_broke_a_connection_serves_once_it_has_what_it_missed(monkeypatch):
    """An update that came while it was doubted went to the others alone."""
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)
    asked = []

    async def bring_up(replica):
        asked.append(replica.state)
        replica.missed = "it has not got version 3 of the policy's weights"

    async def run():
        found = replicas.Replicas(Settings(model="m"), bring_up, None, None)
        [replica] = found.all
        routes = uvicorn.Config(Starlette(routes=[Route("/info", info)]), uds=str(replica.socket), log_level="warning")
        server = uvicorn.Server(routes)
        serving = asyncio.create_task(server.serve())
        replica.process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
        replica._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(replica.socket)))
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.01)
            await replica.refresh(5)
            replica.missed = ""
            assert replica.state == "ready"
            found.suspect(replica, replica.incarnation)
            assert replica.state == "starting"
            watching = asyncio.create_task(found._watch(replica))
            while replica.state == "starting":
                await asyncio.sleep(0.01)
        assert replica.state == "stale"
        assert asked == ["starting"]
        watching.cancel()
        server.should_exit = True
        await serving
        await found.stop()

    asyncio.run(run())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])  # uvicorn takes uvloop where it is installed
def test_a_process_that_ends_before_it_is_told_its_settings_is_a_lost_replica(monkeypatch, tmp_path, loop):
    create = asyncio.create_subprocess_exec

    async def ended(*command, **options):
        process = await create(*command, **options)
        process.kill()
        await process.wait()
        return process

    async def run():
        replica = Replica(0, tmp_path, Settings(model="m").replica(), {})
        monkeypatch.setattr(asyncio, "create_subprocess_exec", ended)
        await replica.start()
        with pytest.raises(ReplicaLost, match="it ended while it started"):
            await replica.wait_until_up(20)
        await replica.end()

    with asyncio.Runner(loop_factory=pytest.importorskip(loop).new_event_loop) as runner:
        runner.run(run())


def test_a_client_that_takes_no_more_is_given_up():
    taken, ended = [], []

    async def pieces():
        try:
            while True:
                yield b"x"
        finally:
            ended.append("pieces")

    async def for_ever():
        await asyncio.Event().wait()

    async def send(event):
        if len(taken) == 3:
            await for_ever()
        taken.append(event)

    async def run():
        async with asyncio.timeout(5):
            await StreamedResponse(pieces(), {}, patience=0.1)({}, for_ever, send)

    asyncio.run(run())
    assert [event.get("body") for event in taken] == [None, b"x", b"x"]
    assert ended == ["pieces"]


@pytest.mark.parametrize(
    ("devices", "message"),
    [(["0a1b"], "replica 0: trainer and server are on the same accelerator: 0a1b"), ([], "needs accelerators")],
)
def test_a_group_that_cannot_be_is_refused_before_a_replica_is_told(tmp_path, devices, message):
    async def run():
        replica = Replica(0, tmp_path, {}, {})  # without a process: who asks it gets ReplicaLost
        replica.report, replica.missed = msgspec.structs.replace(REPORT, devices=devices), ""
        made = Communicator(Store(), "http://127.0.0.1:1", "key", 5)
        with pytest.raises(HTTPException, match=message):
            await made.connect(wire.CommunicatorMessage(backend="nccl", devices=["GPU-0A1B"], timeout=5), [replica])
        with pytest.raises(HTTPException, match="make one by POST /communicator"):
            made.members([replica])

    asyncio.run(run())
