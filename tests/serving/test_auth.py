"""Who may come in: every route but GET /health needs the key, and the key's file is its user's alone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import stat

import calls
import httpx
import psutil
import pytest
import servers
from signals import handled

from slipstream.serving import auth
from slipstream.serving.app import Server, make_app
from slipstream.serving.settings import Settings

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")


def routes():
    """Every path of the app, with something in place of its variables."""
    server = Server(Settings(model="m"), "http://127.0.0.1:1", "k" * 16, None)
    app = make_app(server, "k" * 16)
    paths = {route.path.replace("{path:path}", "completions") for route in app.routes}
    server.replicas._folder.cleanup()
    assert {"/generate", "/weights/body", "/communicator/store", "/v1/completions", "/docs", "/openapi.json"} <= paths
    return sorted(paths)


def test_every_route_needs_the_key(server):
    others = ["/", "/metrics", "/collective_rpc", "/nothing", "/health/", "//health", "/health?x=1"]
    with httpx.Client(timeout=60) as client:
        for path in [*routes(), *others]:
            for method in METHODS:
                for headers in ({}, {"authorization": "Bearer wrong-key-of-some-length"}):
                    status = client.request(method, server.url + path, headers=headers).status_code
                    is_open = method == "GET" and path.partition("?")[0] == "/health"
                    assert (status == 401) != is_open, (method, path, status)


@pytest.mark.parametrize(
    "value",
    [
        "", "Bearer", servers.KEY, f"Basic {servers.KEY}", f"Bearer {servers.KEY}x", f"Bearer  {servers.KEY}",
        f"Bearer {servers.KEY[:-1]}", f"Bearer {servers.KEY.upper()}",
    ],
)  # fmt: skip
def test_other_authorizations_are_refused(server, value):
    answer = calls.CLIENT.get(f"{server.url}/server_info", headers={"authorization": value})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert servers.KEY not in answer.text


def test_the_key_opens(server):
    assert calls.CLIENT.get(f"{server.url}/server_info", headers=server.headers).status_code == 200
    assert calls.CLIENT.get(f"{server.url}/health").json() == {"status": "ready"}


def test_two_keys_are_none(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("GET", "/server_info")
    connection.putheader("Authorization", "Bearer wrong")
    connection.putheader("Authorization", f"Bearer {server.key}")
    connection.endheaders()
    assert connection.getresponse().status == 401


def test_no_route_of_vllms_own_server_is_there(server):
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as client:
        for path in (
            "/collective_rpc", "/pause", "/resume", "/sleep", "/wake_up", "/update_weights", "/invocations", "/metrics",
            "/v1/../info", "/v1/%2e%2e/info", "/v1/..%2finfo", "/v1/%2e%2e%2finfo",
            "/v1/%252e%252e/info", "/v1/%252e%252e/reset_prefix_cache", "/v1/load_lora_adapter", "/info",
            "/reset_mm_cache",
        ):  # fmt: skip
            for method in ("GET", "POST"):
                answer = client.request(method, httpx.URL(server.url + path), json={})
                assert answer.status_code in (404, 405), (method, path, answer.status_code)


def test_the_key_is_never_logged(server):
    calls.CLIENT.post(f"{server.url}/generate", headers=server.headers, content=b"{")
    assert servers.KEY not in server.output()


def test_a_key_is_made_and_kept_for_its_user_alone(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIPSTREAM_API_KEY", raising=False)
    server = servers.start_server(tiny_model, key=None, wait=False)
    try:
        [replica] = servers.until(server.replicas, 60, server)
        replica.suspend()  # it starts for as long as the test takes
        path = auth.key_path(server.port)
        assert f"key: {path}" in server.output()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert len(server.key) >= 43  # 32 random bytes
        assert server.key not in server.output()
        assert auth.find_key("127.0.0.1", server.port) == auth.find_key("localhost", server.port) == server.key
        assert auth.find_key("192.0.2.1", server.port) is None  # not this machine
        assert auth.find_key("127.0.0.1", server.port + 1) is None
        answer = calls.CLIENT.get(f"{server.url}/server_info", headers=server.headers)
        assert answer.status_code == 503  # the key fits, and no replica is up yet
        assert answer.json() == {"detail": "replica 0 is starting"}
        assert calls.CLIENT.get(f"{server.url}/health").json() == {"detail": "starting"}
        generate = calls.CLIENT.post(f"{server.url}/generate", headers=server.headers, json={"prompts": [{"ids": [5]}]})
        assert (generate.status_code, generate.json()) == (503, {"detail": "replica 0 is starting"})
        path.chmod(0o640)
        with pytest.raises(PermissionError, match="mode 640"):
            auth.find_key("127.0.0.1", server.port)
        path.chmod(0o600)
        replica.resume()
    finally:
        server.stop()
    assert not path.exists()


@pytest.fixture
def hangups():
    """Processes started here notice that a terminal is closed, also where the tests run under nohup."""
    with handled(signal.SIGHUP, signal.SIG_DFL):
        yield


@pytest.mark.usefixtures("hangups")
def test_a_terminal_that_is_closed_leaves_nothing(tiny_model, tmp_path):
    server = servers.start_server(tiny_model, key=None, env={"XDG_STATE_HOME": str(tmp_path)}, wait=False)
    [key] = tmp_path.glob("slipstream/*.key")
    children = servers.until(server.children, 60, server)
    try:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(60) == 0
        assert not psutil.wait_procs(children, timeout=60)[1]
        assert not key.exists()
    finally:
        if server.process.poll() is None:
            server.stop()


def test_the_variable_is_found_first(monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "given")
    assert auth.find_key("192.0.2.1", 1) == "given"


@pytest.mark.parametrize("key", ["", "a" * 15, "ü" * 16, "a b" * 8, "a\n" * 8])
def test_weak_keys_are_refused(key):
    with pytest.raises(ValueError, match="SLIPSTREAM_API_KEY"):
        auth.check_key(key)


def test_keys_are_compared_in_constant_time():
    """Time itself is not measured: the comparison is hmac's, on bytes of any content."""
    guard = auth.Guard(None, "k" * 16)
    for given in (b"Bearer " + b"k" * 16, b"Bearer \xff\xfe", b"bearer " + b"k" * 16):
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"authorization", given)]}
        assert guard._allowed(scope) == (given.lower() == b"bearer " + b"k" * 16)


def test_a_websocket_is_refused():
    import asyncio

    sent = []

    async def send(event):
        sent.append(event)

    async def run():
        await auth.Guard(None, "k" * 16)({"type": "websocket", "path": "/", "headers": []}, None, send)

    asyncio.run(run())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_client_that_has_no_home_still_looks_in_the_right_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth.key_path(8000).parent == tmp_path / ".local" / "state" / "slipstream"
    assert os.path.basename(auth.key_path(8000)).endswith("-8000.key")


def test_an_error_is_json(server):
    assert "detail" in json.loads(calls.CLIENT.get(f"{server.url}/nothing").content)
