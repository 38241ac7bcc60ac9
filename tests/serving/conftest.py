"""One server for all tests of this folder that do not end one, and one for each module that needs its own."""

from __future__ import annotations

import os

import calls
import pytest
import servers
import tiny

IDLE_SECONDS = 12
# Options of a module's own server.
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
def server(tiny_model):
    """A server with one replica, which leaves nothing behind when it ends.

    Its weights are the checkpoint's unless a test changes them.
    """
    started = servers.start_server(tiny_model)
    yield started
    reply = calls.begin(started, 1, calls.weights(tiny_model, 1)[1])
    started.stop()
    assert not os.path.exists(reply.path)


@pytest.fixture(scope="module")
def own_server(tiny_model, request):
    """The server that this module has to itself."""
    started = servers.start_server(tiny_model, *OTHERS[request.path.name])
    yield started
    if started.process.poll() is None:
        started.stop()
