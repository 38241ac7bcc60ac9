"""One server for all tests of this folder that do not end one, and the others, which start while it is used."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import calls
import pytest
import servers
import tiny

IDLE_SECONDS = 6
# By module, in the order of their use.
OTHERS = {
    "test_client.py": (),
    "test_reference.py": ("--reference",),
    "test_replicas.py": ("--data-parallel-size", 2, "--update-timeout", IDLE_SECONDS),
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the tiny model, with a variable in its chat template."""
    path = tiny.build(tmp_path_factory.mktemp("serving") / "tiny")
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ hint }}")
    return path


@pytest.fixture(scope="session")
def server(tiny_model, request):
    """A server with one replica, which leaves nothing behind when it ends.

    Its weights are the checkpoint's unless a test changes them.
    """
    started = servers.start_server(tiny_model)
    request.getfixturevalue("others")
    yield started
    reply = calls.begin(started, 1, calls.weights(tiny_model, 1)[1])
    started.stop()
    assert not os.path.exists(reply.path)


@pytest.fixture(scope="session")
def others(tiny_model, request):
    """Futures of the servers that a module has to itself, by module. One after the other is started."""
    modules = {item.path.name for item in request.session.items}
    with ThreadPoolExecutor(1) as pool:
        started = {
            name: pool.submit(servers.start_server, tiny_model, *options)
            for name, options in OTHERS.items()
            if name in modules
        }
        yield started
        for future in started.values():
            if future.result().process.poll() is None:
                future.result().stop()


@pytest.fixture(scope="module")
def own_server(others, request):
    """The server that this module has to itself."""
    return others[request.path.name].result()
