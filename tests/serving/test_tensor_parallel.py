"""A server whose replicas are spread over two workers each: their halves of every weight arrive, and they answer."""

from __future__ import annotations

import contextlib
import copy
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import tiny
import torch
from serving.servers import start_server, until
from serving.two_workers import PROMPTS, changed, differences, errors, logits_of, named

from slipstream.generation.engine import Request, Sampling
from slipstream.serving.client import VLLMClient
from slipstream.weights.plan import WeightUpdateError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    # Four heads and two for keys and values, which halve.
    return tiny.build(tmp_path_factory.mktemp("models") / "halved", hidden=128)


@pytest.fixture(scope="module")
def client(path):
    server = start_server(path, "--tensor-parallel-size", 2, timeout=240)
    try:
        with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as made:
            made.log = server
            yield made
    finally:
        server.stop()


@pytest.mark.parametrize("way", ["shared memory", "process group"])
def test_weights_arrive_in_both_halves(client, path, way):
    assert client.get_world_size() == 2
    assert "tensor-parallel 2 x data-parallel 1" in client.log.output()
    if way == "process group":
        client.init_communicator()
    for seed in (1, 2):
        model = changed(path, seed + 10 * (way == "process group"))
        version = (client.server_info().version or 0) + 1
        client.update_weights(version, named(model))
        sampled = client.sample([Request(p, n=2, seed=3) for p in PROMPTS], Sampling(16), version)
        assert errors(model, sampled)[0] < 1e-4
        greedy = client.sample([Request(p) for p in PROMPTS], Sampling(16, temperature=0.0), version)
        assert errors(model, greedy)[1]
    if way == "process group":
        client.close_communicator()


def test_half_an_update_leaves_the_old_weights(client, path):
    model = changed(path, 5)
    version = (client.server_info().version or 0) + 1
    client.update_weights(version, named(model))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.gate_proj.weight.mul_(float("nan"))
    with pytest.raises(WeightUpdateError, match="not finite"):
        client.update_weights(version + 1, named(other))
    with pytest.raises(WeightUpdateError, match="incomplete"):
        client.update_weights(version + 1, [(n, t) for n, t in named(model) if "layers.1.mlp.up_proj" not in n])
    answers = client.sample([Request(p, seed=3) for p in PROMPTS], Sampling(16), version)
    assert errors(model, answers)[0] < 1e-4


def test_an_update_in_flight_says_which_tokens_are_whose(client, path):
    old, new = changed(path, 7), changed(path, 8)
    requests = [Request(p, n=64, seed=3) for p in PROMPTS]
    switched = 0
    for _ in range(5):  # all may end before the update is there, where others have the processor
        version = (client.server_info().version or 0) + 1
        client.update_weights(version, named(old))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.sample, requests, Sampling(200, extra={"ignore_eos": True}), version)
            until(lambda run=running: client.server_info().replicas[0].running or run.done(), 60, client.log)
            client.update_weights(version + 1, named(new))
            answers = running.result(120)
        for prompt, group in zip(PROMPTS, answers, strict=True):
            for completion in group:
                if len(completion.version_runs) < 2:  # it ended before, or began after
                    continue
                switched += 1
                (_, before), (first, after) = completion.version_runs
                assert (before, after) == (version, version + 1)
                assert differences(logits_of(old, prompt, completion), completion)[:first].max() < 1e-4
                assert differences(logits_of(new, prompt, completion), completion)[first:].max() < 1e-4
        if switched:
            break
    assert switched


def test_an_engine_that_is_starting_ends_with_its_server(path):
    """vLLM's processes import for seconds what they run, and have no server to ask whether it lives."""
    server = start_server(path, "--tensor-parallel-size", 2, wait=False)

    def engine():
        """A process below a replica that was told to run somebody's function, as vLLM starts its engine core."""
        for child in server.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    return child
        return None

    until(engine, 60, server)
    time.sleep(0.3)
    children = server.children()
    server.process.kill()
    server.process.wait(60)
    left = psutil.wait_procs(children, timeout=60)[1]
    for child in left:
        child.kill()
    assert not left
