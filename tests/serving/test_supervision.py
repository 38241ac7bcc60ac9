"""How a server's replicas are supervised, without an engine: what answers on the socket is this process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import resource
import sys

import aiohttp
import msgspec
import pytest
import uvicorn
from fastapi import HTTPException
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from slipstream.serving import replicas, wire
from slipstream.serving.asking import ReplicaLost, ask_all
from slipstream.serving.communicator import Communicator
from slipstream.serving.replica_process import Replica
from slipstream.serving.router import Answer
from slipstream.serving.settings import Settings
from slipstream.serving.store import Store
from slipstream.serving.streaming import StreamedResponse

REPORT = wire.ReplicaReport(
    state="ready", version=2, running=0, devices=[], ranks=1, max_model_len=9, dtype="float32", vllm="0", platform="cpu"
)


async def info(request):
    return Response(wire.encode(REPORT), media_type=wire.MSGPACK)


@contextlib.asynccontextmanager
async def watched(bring_up, info, generate=None):
    """A server's replicas, of which the only one is ready, watched, and answered for by `info` and `generate`."""
    found = replicas.Replicas(Settings(model="m"), bring_up, None, None)
    [replica] = found.all
    routes = [Route("/info", info), Route("/generate", generate or info, methods=["POST"])]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), uds=str(replica.socket), log_level="warning"))
    serving = asyncio.create_task(server.serve())
    replica.process = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    replica._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(replica.socket), force_close=True))
    try:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            while not server.started:
                await asyncio.sleep(0.01)
            await replica.refresh(60)
            replica.missed = ""
            assert replica.state == "ready"
            watching = group.create_task(found._watch(replica))
            yield found, replica
            watching.cancel()
    finally:
        server.should_exit = True
        await serving
        await found.stop()


def test_a_replica_that_broke_a_connection_serves_once_it_has_what_it_missed(monkeypatch):
    """An update that came while it was doubted went to the others alone."""
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)
    asked = []

    async def bring_up(replica):
        asked.append(replica.state)
        replica.missed = "it has not got version 3 of the policy's weights"

    async def run():
        async with watched(bring_up, info) as (found, replica):
            found.suspect(replica, replica.incarnation)
            assert replica.state == "starting"
            while replica.state == "starting":
                await asyncio.sleep(0.01)
            assert replica.state == "stale"
        assert asked == ["starting"]

    asyncio.run(run())


def test_who_waits_for_a_replica_that_was_doubted_while_it_was_asked_hears_of_its_return(monkeypatch):
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)
    doubts = []

    async def info(request):
        if doubts:
            doubts.pop()()
        return Response(wire.encode(REPORT), media_type=wire.MSGPACK)

    async def bring_up(replica):
        await asyncio.sleep(0.05)  # who was waiting is waiting again
        replica.missed = ""

    async def run():
        async with watched(bring_up, info) as (found, replica):
            doubted = asyncio.Event()

            def doubt():
                found.suspect(replica, replica.incarnation)
                doubted.set()

            doubts.append(doubt)
            await doubted.wait()
            assert await found.serving_soon() == [replica]

    asyncio.run(run())


def test_completions_that_come_together_with_an_error_are_not_lost(monkeypatch):
    """They are passed on; those that are left are asked for again."""
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)
    asked = []

    async def generate(request):
        prompts = wire.decode(await request.body(), wire.GenerateMessage).prompts
        asked.append([(prompt.n, prompt.seed) for prompt in prompts])
        if len(asked) == 1:
            return Response(made(0, 1) + wire.error_frame(503, "the engine ended a completion of prompt 0 by 'abort'"))
        return Response(made(0, 0) + made(1, 0) + wire.end_frame(2))

    def made(prompt, sample):
        return wire.completion_frame(prompt, sample, [len(asked), prompt], None, "stop", [(0, 2)])

    async def bring_up(replica):
        replica.missed = ""

    async def run():
        async with watched(bring_up, info, generate) as (found, replica):
            answer = Answer(found, wire.GenerateMessage(prompts=[wire.PromptMessage(ids=[5], n=3, seed=7)]))
            await answer.open()
            reader = wire.FrameReader()
            frames = [frame async for piece in answer.frames() for frame in reader.feed(piece)]
            reader.finish()
            await answer.close()
            assert asked == [[(3, 7)], [(1, 7), (1, 9)]]
            assert {frame.sample: frame.completion.ids for frame in frames} == {0: [2, 0], 1: [1, 0], 2: [2, 1]}
            assert replica.running == 0

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
            await replica.wait_until_up(60)
        await replica.end()

    with asyncio.Runner(loop_factory=pytest.importorskip(loop).new_event_loop) as runner:
        runner.run(run())


def test_a_replica_whose_output_nobody_reads_does_not_wait_for_that(monkeypatch, tmp_path):
    """The reader of the server's own output has gone, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)

    async def run():
        replica = Replica(0, tmp_path, {}, {})
        replica.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('line\\n' * 100_000 + 'last')", stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(60):
            await replica.forward_output()
            assert await replica.process.wait() == 0
        assert replica.lines[-1] == "last"

    with os.fdopen(writing, "wb", 0) as closed, io.TextIOWrapper(closed, write_through=True) as text:
        monkeypatch.setattr(sys, "stderr", text)
        asyncio.run(run())


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
        async with asyncio.timeout(60):
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


@contextlib.contextmanager
def no_files_left():
    """This process may open no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # those that are open stay open
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_replica_is_not_doubted_by_a_server_that_has_no_files_left(monkeypatch):
    """Neither is it ended, whoever wants to ask it."""
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)
    asked = []

    async def info(request):
        asked.append(request.url.path)
        return Response(wire.encode(REPORT), media_type=wire.MSGPACK)

    async def run():
        async with watched(None, info) as (_, replica):
            with no_files_left():
                [error] = (await ask_all([replica], "/weights/begin", None, 60))[1].values()
                assert "ulimit -n" in str(error)
                asked.clear()
                await asyncio.sleep(0.2)  # as long as it takes to be asked four times
                assert not asked
            while not asked:
                await asyncio.sleep(0.01)
            assert replica.state == "ready"
            assert replica.process.returncode is None

    asyncio.run(run())


def test_a_request_that_no_files_are_left_for_ends_in_its_error_alone(monkeypatch):
    """The replica that it was for is not lost to anybody."""
    asked = []

    async def run():
        async with watched(None, info) as (found, replica):
            monkeypatch.setattr(found, "suspect", lambda *replica: asked.append(replica))
            prompts = [wire.PromptMessage(ids=wire.pack_ids([5]), n=2)]
            message = wire.GenerateMessage(prompts=prompts, sampling=wire.SamplingMessage())
            with (
                no_files_left(),
                pytest.raises(HTTPException, match=r"too many files open to ask replica 0.*ulimit"),
            ):
                await Answer(found, message).open()
            assert (replica.state, replica.running, replica.process.returncode) == ("ready", 0, None)
            assert not asked

    asyncio.run(run())


def test_a_replica_that_no_files_are_left_for_is_started_later(monkeypatch, caplog):
    """The server goes on meanwhile: it has others, which are well."""
    monkeypatch.setattr(replicas, "WATCH_SECONDS", 0.05)
    create, given_up = asyncio.create_subprocess_exec, []

    async def sleep(*command, **options):
        return await create("sleep", "600", **options)

    async def run():
        found = replicas.Replicas(Settings(model="m"), None, None, lambda: given_up.append(True))
        [replica] = found.all
        with no_files_left():
            found.start()
            await asyncio.sleep(0.2)  # as long as it takes to try four times
            assert replica.process is None
            assert "too many files open to start replica 0" in caplog.text
        monkeypatch.setattr(asyncio, "create_subprocess_exec", sleep)
        async with asyncio.timeout(60):
            while replica.process is None:
                await asyncio.sleep(0.01)
        assert (replica.state, given_up) == ("starting", [])
        await found.stop()

    asyncio.run(run())
