"""A server whose two workers Ray runs on two machines: the second is one whose shared memory is another.

Ray is no part of the locked environment: `pip install ray` to run this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import tiny
from launching import found_first
from serving.servers import start_server, until
from serving.two_workers import PROMPTS, changed, errors, named

from slipstream.generation.engine import Request, Sampling
from slipstream.serving.client import VLLMClient

HERE = Path(__file__).parent
ELSEWHERE = ("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
END_SECONDS = 60
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay at 127.0.0.1, as Ray does there, and listen nowhere else
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # other tests' memory is not its concern
    "VLLM_HOST_IP": "127.0.0.1",
}


def elsewhere():
    """How to start a process that sees another /dev/shm; None if this is not allowed."""
    for unshare in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        with contextlib.suppress(OSError):
            if not subprocess.run([*unshare, *ELSEWHERE, "true"], capture_output=True).returncode:
                return (*unshare, *ELSEWHERE)
    return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install ray"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(
        find_spec("ray") is not None and elsewhere() is None,
        reason="a process may not have a /dev/shm of its own here (unshare --mount), as a second machine has",
    ),
]


class Machine:
    """A machine of a Ray cluster, as `ray_machine` makes it."""

    def __init__(self, address, folder, environment, prefix=()):
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "ray_machine.py"), address, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("127.0.0.1:")

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self):
        """The processes of vLLM's workers on it."""
        found = []
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayWorker" in child.name() and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        return found

    def stop(self):
        """End it. Nothing of it is left."""
        children = self.children()
        self.process.stdin.close()
        self.process.wait(60)
        left = psutil.wait_procs(children, timeout=END_SECONDS)[1]
        for child in left:
            child.kill()
        assert not left


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of servers and machines: vLLM finds `ray_on_cpu` there."""
    plugin = tmp_path_factory.mktemp("plugin")
    shutil.copy(HERE / "ray_on_cpu.py", plugin)
    about = plugin / "ray_on_cpu-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:platform\n")
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": found_first(plugin)}


@pytest.fixture(scope="module")
def machines(environment):
    # Not in pytest's folder, whose name is too long for the sockets in it.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, contextlib.ExitStack() as stack:
        started = []
        for prefix in ((), elsewhere()):
            address = started[0].address if started else ""
            started.append(Machine(address, folder, environment, prefix))
            stack.callback(started[-1].stop)
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models") / "halved", hidden=128)


@pytest.fixture
def server(model, machines, environment):
    environment = environment | {"RAY_ADDRESS": machines[0].address}
    options = ("--tensor-parallel-size", 2, "--distributed-executor-backend", "ray")
    started = start_server(model, *options, env=environment, timeout=240)
    yield started
    if started.process.poll() is None:
        started.stop()


def workers(machines):
    return [worker for machine in machines for worker in machine.workers()]


def assert_serves(client, model, version):
    sampled = client.sample([Request(p, n=2, seed=3) for p in PROMPTS], Sampling(16), version)
    assert errors(model, sampled)[0] < 1e-4


def test_weights_reach_workers_on_two_machines(server, machines, model):
    assert [len(machine.workers()) for machine in machines] == [1, 1]
    with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as client:
        [replica] = client.server_info().replicas
        assert (replica.ranks, replica.shares_memory) == (2, False)
        for transport in ("shared_memory", "body"):
            with pytest.raises(ValueError, match=f"transport='{transport}' .* has workers on other machines"):
                client.init_communicator(transport=transport)
        for version in (1, 2):
            weights = changed(model, version)
            client.update_weights(version, named(weights))
            assert_serves(client, weights, version)

        workers(machines)[1].kill()
        until(lambda: client.server_info().replicas[0].state == "starting", 60, server)
        until(lambda: client.server_info().replicas[0].state == "stale", 240, server)
        assert [len(machine.workers()) for machine in machines] == [1, 1]
        client.update_weights(3, named(weights))
        assert_serves(client, weights, 3)
    server.stop()
    until(lambda: not workers(machines), END_SECONDS, server, alive=False)


def test_workers_end_with_a_server_that_is_killed(server, machines):
    started, children = workers(machines), server.children()
    assert len(started) == 2
    server.process.kill()
    server.process.wait(END_SECONDS)
    left = psutil.wait_procs([*started, *children], timeout=END_SECONDS)[1]
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []
