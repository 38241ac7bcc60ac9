"""What a client asks again, how long it waits, and which key it shows, against servers that only pretend to be one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving.pretend import answering

from slipstream.serving import auth, wire
from slipstream.serving.connection import CALL_SECONDS, Connection, LostError

INFO = wire.encode(
    wire.ServerInfo(
        slipstream="1", vllm="1", model="m", dtype="float32", max_model_len=9, tensor_parallel_size=1,
        data_parallel_size=1, version=0, platform="cpu", replicas=[],
    )
)  # fmt: skip
ABORT = wire.AbortMessage(transaction=1)


def verbs(connection):
    """Every kind of call, by what it asks for."""
    return {
        "GET /server_info": lambda: connection.get("/server_info", wire.ServerInfo),
        "POST /weights/commit": lambda: connection.post("/weights/commit", ABORT, wire.ServerInfo),
        "POST /weights/abort": lambda: connection.call("POST", "/weights/abort", ABORT),
        "PUT /weights/body": lambda: connection.call("PUT", "/weights/body", content=b"x"),
        "DELETE /communicator": lambda: connection.call("DELETE", "/communicator"),
        "POST /generate": lambda: list(connection.stream("/generate", ABORT)),
    }


def ok(handler):
    handler.send_response(200)
    handler.send_header("content-type", wire.MSGPACK)
    handler.end_headers()
    handler.wfile.write(INFO)


def test_only_what_changes_nothing_is_asked_again():
    """A connection that breaks does not tell whether the server did what it was asked."""
    with answering(lambda handler: handler.connection.close()) as (port, calls):
        connection = Connection(f"http://127.0.0.1:{port}", "k", 10)
        for verb, call in verbs(connection).items():
            calls.clear()
            with pytest.raises(LostError, match=r"the server does not answer, or has ended .*slipstream vllm-serve"):
                call()
            assert calls == [verb] * (3 if verb.startswith("GET") else 1)


def test_every_call_has_a_deadline():
    asked = {}

    def noted(request):
        asked[f"{request.method} {request.url.path}"] = request.extensions["timeout"]
        return httpx.Response(200, stream=httpx.ByteStream(INFO), headers={"content-type": wire.MSGPACK})

    connection = Connection("http://127.0.0.1:1", "k", 77)
    connection._client = httpx.Client(transport=httpx.MockTransport(noted))
    connection.wait(0)
    assert asked.pop("GET /health")["read"] == 10
    calls = verbs(connection)
    for call in calls.values():
        call()
    assert set(asked) == set(calls)
    for verb, timeout in asked.items():
        assert timeout["read"] == timeout["write"] == (77 if verb == "POST /generate" else CALL_SECONDS)
        assert timeout["connect"] == 30  # a place in the pool is there at once: it has no end


@pytest.mark.parametrize("key", ["a-key-that-nobody-may-see\n", "a spaced key", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv(auth.VARIABLE, key)
    for given in (key, None):
        with pytest.raises(ValueError, match=r"SLIPSTREAM_API_KEY: a key is made of .* no line break") as refused:
            Connection("http://127.0.0.1:1", given, 10)
        assert key.strip() not in str(refused.value)


@pytest.mark.parametrize(("kind", "body"), [("text/html", b"<html>"), (wire.JSON, b'{"vllm_config": ""}')])
def test_what_answers_everything_is_no_server_of_ours(kind, body):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("content-type", kind)
        handler.end_headers()
        handler.wfile.write(body)

    with (
        answering(answer) as (port, calls),
        pytest.raises(ConnectionError, match=r"is not a Slipstream server, or one of another version .*vllm-serve"),
    ):
        Connection(f"http://127.0.0.1:{port}", "k", 10).wait(60)
    assert calls == ["GET /health", "GET /server_info"]


def test_the_key_of_a_server_that_was_started_again_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv(auth.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def closed(handler):
        if handler.headers.get("authorization") == f"Bearer {keys[-1].key}":
            ok(handler)
        else:
            handler.send_error(401)

    with answering(closed) as (port, calls):
        keys = [auth.KeyFile(port)]
        connection = Connection(f"http://127.0.0.1:{port}", None, 10)
        for verb, call in verbs(connection).items():
            keys.append(auth.KeyFile(port))
            calls.clear()
            call()
            assert calls == [verb] * 2  # without the key, nothing was done
            call()
            assert calls == [verb] * 3
        keys[-1].remove()
        keys.append(auth.KeyFile(port + 1))  # it has another key, which is not to be found here
        for call in verbs(connection).values():
            with pytest.raises(PermissionError, match="SLIPSTREAM_API_KEY"):
                call()


def test_threads_find_the_new_key_at_the_same_time(monkeypatch, tmp_path):
    """Both were refused with the old one: who comes second finds that the first has found the new one."""
    monkeypatch.delenv(auth.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    refused = threading.Barrier(2)

    def closed(handler):
        if handler.headers.get("authorization") == f"Bearer {keys[-1].key}":
            ok(handler)
        else:
            refused.wait(60)
            handler.send_error(401)

    with answering(closed) as (port, _):
        for verb in ("GET /server_info", "POST /generate"):
            keys = [auth.KeyFile(port)]
            connection = Connection(f"http://127.0.0.1:{port}", None, 60)
            keys.append(auth.KeyFile(port))
            with ThreadPoolExecutor(2) as threads:
                for call in [threads.submit(verbs(connection)[verb]) for _ in range(2)]:
                    assert call.result(60)


def test_a_key_that_goes_while_it_is_looked_for_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv(auth.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = auth.KeyFile(1)
    monkeypatch.setattr(auth, "is_local", lambda host: file.remove() is None)  # its server ends
    assert auth.find_key("127.0.0.1", 1) is None
    assert not file.path.exists()
