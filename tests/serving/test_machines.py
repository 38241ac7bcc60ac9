"""Workers on other machines than their server: which way weights take to them, and what is refused before it begins."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec

import msgspec
import pytest
import torch
from fastapi import HTTPException
from serving.pretend import answering

from slipstream.serving import machine, wire
from slipstream.serving.communicator import Communicator
from slipstream.serving.connection import Connection
from slipstream.serving.joining import make_group
from slipstream.serving.replica_process import Replica
from slipstream.serving.sender import Sender
from slipstream.serving.shared_file import OFFSET, SharedFile
from slipstream.serving.store import Store
from slipstream.weights.plan import WeightUpdateError

REPORT = wire.ReplicaReport(
    state="ready", version=0, running=0, devices=[], ranks=2, max_model_len=9, dtype="float32", vllm="0",
    platform="cpu", shares_memory=False, shares_loopback=False,
)  # fmt: skip
INFO = wire.ServerInfo(
    slipstream="0", vllm="0", model="m", dtype="float32", max_model_len=9, tensor_parallel_size=2,
    data_parallel_size=2, version=0, platform="cpu",
)  # fmt: skip
HERE, THERE = (wire.ReplicaInfo(state="ready", ranks=2, shares_memory=shared) for shared in (True, False))


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


class Workers:
    """An engine with a worker on this machine, and one that is given."""

    def __init__(self, memory, loopback):
        self.other = memory, loopback
        self.asked = []

    async def collective_rpc(self, method, args):
        verb, *arguments = args
        self.asked.append(verb)
        if verb != "shares":
            return [("ok", None)] * 2
        return [("ok", (machine.holds(*arguments), machine.loopback())), ("ok", self.other)]


@needs_vllm
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_replica_finds_out_where_its_workers_are(memory, same):
    from slipstream.serving.replica_weights import Refused, Weights

    async def run():
        engine = Workers(memory, machine.loopback() if same else "another machine's")
        weights = Weights(engine, None, False)
        await weights.look_around()
        assert (weights.shares_memory, weights.shares_loopback) == (memory, same)
        for transport in wire.TRANSPORTS:
            engine.asked.clear()
            begin = wire.BeginMessage(version=1, tensors=[], transport=transport)
            order = wire.ReplicaBegin(transaction=1, update="an update", begin=begin)
            if memory or transport == "group":
                await weights.begin(order)
                continue
            with pytest.raises(Refused, match=rf"transport='{transport}' .* on other machines: use 'group'") as refused:
                await weights.begin(order)
            assert refused.value.status == 409
            assert not engine.asked

    asyncio.run(run())


@needs_vllm
def test_a_machine_without_shared_memory_serves_all_the_same(monkeypatch, tmp_path, caplog):
    from slipstream.serving import shared_file
    from slipstream.serving.replica_weights import Weights

    monkeypatch.setattr(shared_file, "FOLDER", tmp_path / "none")
    weights = Weights(Workers(True, machine.loopback()), None, False)
    asyncio.run(weights.look_around())
    assert (weights.shares_memory, weights.shares_loopback) == (False, True)
    assert "there is no shared memory here" in caplog.text


def test_a_file_is_known_by_its_first_bytes():
    file = SharedFile(0)
    try:
        file.allocate()
        file.renew()
        assert machine.holds(str(file.path), file.nonce)
        assert not machine.holds(str(file.path), bytes(32))
    finally:
        file.close()
    assert not machine.holds(str(file.path), file.nonce)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.4.5.6", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.1.2.3", False),
     ("::ffff:10.1.2.3", False), ("fe80::1%eth0", False), ("server", False), ("", False)],
)  # fmt: skip
def test_addresses_of_this_machine_alone(address, loopback):
    assert machine.is_loopback(address) is loopback


class Connected:
    """A connection to a server that says what it is."""

    def __init__(self, *replicas, platform="cpu"):
        self.info = msgspec.structs.replace(INFO, replicas=list(replicas), platform=platform)

    def get(self, path, kind):
        return self.info


@pytest.mark.parametrize(
    ("replicas", "transport"), [([HERE, HERE], "shared_memory"), ([HERE, THERE], "group"), ([THERE], "group")]
)
def test_a_client_chooses_a_way_to_all_workers(monkeypatch, replicas, transport):
    sender = Sender(Connected(*replicas))
    monkeypatch.setattr(sender, "_make_group", lambda info: None)
    sender.connect("cpu", None)
    assert sender._transport == transport
    for asked in ("shared_memory", "body"):
        if transport == "group":
            with pytest.raises(ValueError, match=rf"transport='{asked}' .* on other machines: use 'group'"):
                sender.connect("cpu", asked)
        else:
            sender.connect("cpu", asked)
            assert sender._transport == asked


@pytest.mark.parametrize("path", ["{folder}/file", "/dev/shm/..{folder}/file", "/dev/shm/../../{folder}/file", "file"])
def test_a_file_that_is_not_in_shared_memory_is_not_written_to(tmp_path, monkeypatch, path):
    """A server says which file, and what its first bytes are: those of a checkpoint are easily guessed."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    replies = {
        "/server_info": INFO,
        "/weights/begin": wire.BeginReply(
            transaction=1, path=path.format(folder=tmp_path), nonce=bytes(8), offset=OFFSET
        ),
    }

    def answer(handler):
        handler.send_response(200)
        handler.send_header("content-type", wire.MSGPACK)
        handler.end_headers()
        handler.wfile.write(wire.encode(replies.get(handler.path, INFO)))

    with answering(answer) as (port, called):
        sender = Sender(Connection(f"http://127.0.0.1:{port}", "k", 10))
        sender.connect("cpu", "shared_memory")
        with pytest.raises(WeightUpdateError, match=r"is not in /dev/shm, where a server's file would be"):
            sender.push(1, [("weight", torch.ones(4))], None, "keep", False)
    assert "POST /weights/abort" in called
    assert file.read_bytes() == bytes(1000)


def test_where_no_way_leads_nothing_is_advised():
    connection = Connected(THERE, platform="cuda")
    with pytest.raises(ValueError, match="no other reaches its workers on several machines"):
        Sender(connection).connect("cpu", None)
    with pytest.raises(ValueError, match="use 'shared_memory' or 'body'"):
        make_group(connection, torch.device("cpu"), Connected(HERE, platform="cuda").info, 1)


def test_workers_elsewhere_are_sent_to_an_address_that_they_can_reach(tmp_path, monkeypatch):
    orders = {}

    async def run():
        near, far = (Replica(index, tmp_path, {}, {}) for index in range(2))
        for replica, apart in ((near, False), (far, True)):
            report = msgspec.structs.replace(REPORT, shares_memory=not apart, shares_loopback=not apart)
            replica.report, replica.missed = report, ""

            async def call(method, path, message, kind, timeout, replica=replica):
                orders[replica] = message

            monkeypatch.setattr(replica, "call", call)
        made = Communicator(Store(), "http://127.0.0.1:8000", "key", 5)
        message = wire.CommunicatorMessage(backend="gloo", devices=[], timeout=5)
        with pytest.raises(HTTPException, match=r"replica 1 has workers on other .* cannot reach .* at 127\.0\.0\.1"):
            await made.connect(message, [near, far], "127.0.0.1")
        assert not orders
        for address, url in (("10.1.2.3", "http://10.1.2.3:8000"), ("fd00::7", "http://[fd00::7]:8000")):
            await made.connect(message, [near, far], address)
            assert (orders[near].store_url, orders[far].store_url) == ("http://127.0.0.1:8000", url)
        await made.connect(message, [near], "127.0.0.1")

    asyncio.run(run())
