"""A server with two replicas: work is spread over them, and the death of one, or of both, costs nobody a completion."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import calls
import httpx
import psutil
import pytest
import servers
from calls import LONG, call, generate, request
from serving.conftest import IDLE_SECONDS

from slipstream.serving import wire
from slipstream.serving.client import VLLMClient

PROMPTS = [[10 + i, 20, 30, 40] for i in range(8)]


@pytest.fixture(scope="module")
def server(own_server):
    wait_until_ready(own_server)
    yield own_server
    own_server.stop()


def states(server):
    return [replica.state for replica in calls.info(server).replicas]


def wait_until_ready(server):
    servers.until(lambda: states(server) == ["ready", "ready"], 180, server)


def kill(server, *indexes):
    processes = [server.replica(index) for index in indexes]
    for process in processes:
        process.kill()
    return processes


def successor(server, index, old):
    """The process that takes the place of `old`, which was replica `index` and is killed; stopped while it starts."""

    def started():
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # between two lives
            found = server.replica(index)
            return found if found != old else None

    found = servers.until(started, 60, server)
    found.suspend()
    return found


@contextlib.contextmanager
def kept_open(server, transaction):
    """The transaction's trainer gives signs of life meanwhile, however long it takes."""
    over = threading.Event()

    def give_signs():
        while not over.wait(1):
            call(server, "POST", "/weights/progress", wire.ProgressMessage(transaction=transaction))

    with ThreadPoolExecutor(1) as pool:
        signs = pool.submit(give_signs)
        try:
            yield
        finally:
            over.set()
    signs.result()


def stream(server, message, *acts):
    """The completions of a call, with each of `acts` (after, act) done when `after` of them have come."""
    headers = {**server.headers, "content-type": wire.MSGPACK}
    reader, found, acts = wire.FrameReader(), {}, list(acts)
    with httpx.stream(
        "POST", f"{server.url}/generate", content=wire.encode(message), headers=headers, timeout=120
    ) as answer:
        assert answer.status_code == 200
        for data in itertools.chain([b""], answer.iter_raw()):
            for frame in reader.feed(data):
                assert (frame.prompt, frame.sample) not in found
                found[frame.prompt, frame.sample] = frame.completion
            while acts and len(found) >= acts[0][0]:
                acts.pop(0)[1]()
    reader.finish()
    assert not acts
    return found


def ids_of(found):
    return {key: completion.ids for key, completion in found.items()}


def ragged(server):
    """A call whose completions end at different times."""
    return request(PROMPTS, n=32, seed=11, max_tokens=250, version=calls.info(server).version)


def test_the_server_says_how_many_workers_it_starts(server):
    assert "starting 2 workers (tensor-parallel 1 x data-parallel 2)" in server.output()
    assert len(server.replicas()) == 2


def running(server):
    return [replica.running for replica in calls.info(server).replicas]


def test_prompts_are_spread_and_groups_stay_together(server):
    def streamed(message):
        headers = {**server.headers, "content-type": wire.MSGPACK}
        return httpx.stream(
            "POST", f"{server.url}/generate", content=wire.encode(message), headers=headers, timeout=120
        )

    for _ in range(5):  # on a busy machine some may have ended before one looks: that shows nothing
        with streamed(request(PROMPTS[:6], n=80, max_tokens=250, extra=LONG)) as answer:
            first = running(server)
            # Seconds of work, still under way when the next one begins: that goes to whichever has less to do.
            with streamed(request(PROMPTS[:1], n=4, max_tokens=250, extra=LONG)) as other:
                both = running(server)
                calls.frames_of(b"".join(other.iter_raw()))
            frames = calls.frames_of(b"".join(answer.iter_raw()))
        assert {(frame.prompt, frame.sample) for frame in frames} == {(p, s) for p in range(6) for s in range(80)}
        assert running(server) == [0, 0]
        if (sum(first), sum(both)) == (480, 484):
            break
    assert first == [240, 240]
    assert sorted(both) == [240, 244]


def test_an_error_names_the_callers_prompt(server):
    message = request([*PROMPTS[:3], [126, 200]], max_tokens=4)
    answer = call(server, "POST", "/generate", message)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("prompt 3 has the token id 200")


def test_weights_reach_both(server, tiny_model):
    model, tensors = calls.weights(tiny_model, 1)
    assert calls.push(server, 3, tensors).version == 3
    assert [replica.version for replica in calls.info(server).replicas] == [3, 3]
    found = generate(server, request(PROMPTS, temperature=0.0, version=3, extra=LONG))
    for (prompt, _), completion in found.items():
        assert completion.ids == calls.greedy(model, PROMPTS[prompt], 16)


def test_a_push_may_take_longer_than_a_silence(server, tiny_model):
    """Both ways of the weights lead past the server, to which a trainer that sends for long would look dead."""
    _, tensors = calls.weights(tiny_model, 6)

    def slowly():
        for name, tensor in tensors:
            time.sleep((IDLE_SECONDS + 2) / len(tensors))  # gathers it
            yield name, tensor

    with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as client:
        for version, transport in ((4, "group"), (5, "shared_memory")):
            client.init_communicator("cpu", transport)
            client.update_weights(version, slowly(), specs=calls.specs_of(tensors))
            assert [replica.version for replica in calls.info(server).replicas] == [version, version]
        client.close_communicator()


def test_a_replica_that_dies_costs_no_completion_and_no_update(server, tiny_model):
    expected = generate(server, ragged(server))
    model, tensors = calls.weights(tiny_model, 2)
    reply = calls.begin(server, 4, tensors)
    sums = calls.write(reply, tensors)
    dying = server.replica(1)
    with kept_open(server, reply.transaction):
        # It is stopped at once, so that it cannot have done its share when it is killed.
        found = stream(server, ragged(server), (0, dying.suspend), (1, dying.kill))
        next_one = successor(server, 1, dying)
    assert ids_of(found) == ids_of(expected)
    assert "completions are asked for again" in server.output()
    # Replica 1 starts again, without what was staged; the other takes the update.
    assert states(server) == ["ready", "starting"]
    done = calls.commit(server, reply.transaction, sums)
    assert done.version == 4
    assert len(generate(server, request(PROMPTS, version=4))) == 8
    with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as client:
        client.init_communicator("cpu", "group")  # replica 1 is not in this group
        next_one.resume()
        wait_until_ready(server)
        assert [replica.version for replica in calls.info(server).replicas] == [4, 4]
        message = request(PROMPTS, temperature=0.0, version=4, extra=LONG)
        message.update = done.update  # given to the one that had missed it, it is the same update
        found = generate(server, message)
        assert [found[p, 0].ids for p in range(8)] == [calls.greedy(model, prompt, 16) for prompt in PROMPTS]
        client.update_weights(5, tensors)
        assert [replica.version for replica in calls.info(server).replicas] == [5, 5]
        client.close_communicator()
    calls.push(server, 4, tensors)


@pytest.mark.slow
def test_when_all_replicas_die_the_call_goes_on_later(server):
    expected, serving = generate(server, ragged(server)), calls.info(server).version
    model = httpx.get(f"{server.url}/v1/models", headers=server.headers, timeout=60).json()["data"][0]["id"]
    asked = {"stream": True, "model": model, "prompt": PROMPTS[0], "n": 1000, "max_tokens": 250, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, headers=server.headers, timeout=60) as answer:
        found = stream(server, ragged(server), (1, lambda: kill(server, 0, 1)))
        with pytest.raises(httpx.RemoteProtocolError):
            list(answer.iter_raw())
    assert ids_of(found) == ids_of(expected)
    assert {completion.weight_version for completion in found.values()} == {serving}
    wait_until_ready(server)
    assert "an answer to an OpenAI client is cut off" in server.output()
    assert "Traceback" not in server.output()


@pytest.mark.slow
def test_a_stuck_replica_is_ended_and_an_idle_transaction_is_dropped(server, tiny_model):
    _, tensors = calls.weights(tiny_model, 3)
    reply = calls.begin(server, 7, tensors)
    sums = calls.write(reply, tensors)
    stuck = server.replica(0)
    stuck.suspend()
    began = time.monotonic()
    assert calls.commit(server, reply.transaction, sums).version == 7
    assert time.monotonic() - began < IDLE_SECONDS + 60
    assert states(server) == ["starting", "ready"]
    stuck.wait(60)
    # What begins now takes the place of version 7 in shared memory: there is nothing to give to the replica.
    for _ in range(5):  # on a busy machine it may be dropped before one looks
        reply = calls.begin(server, 8, tensors)
        if (transaction := calls.info(server).transaction) is not None:
            break
    assert transaction == reply.transaction
    servers.until(lambda: calls.info(server).transaction is None, IDLE_SECONDS + 60, server)
    assert f"transaction {reply.transaction} is dropped: silent for" in server.output()
    servers.until(lambda: states(server) == ["stale", "ready"], 180, server)
    info = calls.info(server)
    assert info.version == 7
    assert info.replicas[0].detail == "it has not got version 7 of the policy's weights"
    assert len(generate(server, request(PROMPTS, version=7))) == 8
    _, tensors = calls.weights(tiny_model, 4)
    assert calls.push(server, 9, tensors).version == 9
    assert states(server) == ["ready", "ready"]


def test_quick_deaths_end_a_replica_and_then_the_server_says_why(server):
    for index, left in ((0, ["dead", "ready"]), (1, ["dead", "dead"])):
        deadline = time.monotonic() + 180
        while calls.info(server).replicas[index].state != "dead":
            assert time.monotonic() < deadline
            with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # between two lives
                process = server.replica(index)
                process.kill()
                process.wait(60)
        assert states(server) == left
        if index == 0:
            assert len(generate(server, request(PROMPTS))) == 8
    answer = call(server, "POST", "/generate", request(PROMPTS))
    assert answer.status_code == 503
    assert "replica 0 is dead: " in answer.json()["detail"]
    assert "its last lines:" in answer.json()["detail"]
    health = httpx.get(f"{server.url}/health", timeout=60)
    assert (health.status_code, health.json()) == (503, {"detail": "no replica serves; see the server's log"})
