"""A server's engine on an NVIDIA GPU, where it is a process of its own: whose weights sampled which token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from integration import engines
from serving.servers import start_server, until

from slipstream.generation.engine import Request, Sampling
from slipstream.serving.client import VLLMClient
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = engines.prompts(8, 20)
LONG = Sampling(220, extra={"ignore_eos": True})


def test_an_update_in_flight_says_which_tokens_are_whose(tmp_path):
    path = tiny.build(tmp_path / "small", hidden=256, layers=4)
    old, new = (engines.step(engines.policy(path), seed=seed, scale=0.02) for seed in (1, 2))
    server = start_server(path, "--gpu-memory-utilization", "0.2", "--enforce-eager", "true", timeout=300)
    try:
        with VLLMClient(base_url=server.url, api_key=server.key) as client, ThreadPoolExecutor(1) as pool:
            client.init_communicator("cpu")
            client.update_weights(1, named_tensors(old))
            client.sample([Request(p) for p in PROMPTS], LONG)
            running = pool.submit(client.sample, [Request(p, n=8, seed=3) for p in PROMPTS], LONG, 1)
            until(lambda: client.server_info().replicas[0].running, 30, server)
            client.update_weights(2, named_tensors(new))
            answers = running.result(120)
    finally:
        server.stop()
    switched = 0
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for completion in group:
            runs = completion.version_runs or ((0, completion.weight_version),)
            switched += len(runs) == 2
            for (first, version), end in zip(runs, [*(first for first, _ in runs[1:]), None], strict=True):
                told = torch.tensor(completion.logprobs)[first:end]
                mine, others = (
                    (engines.logprobs(weights, prompt, completion.ids)[first:end] - told).abs()
                    for weights in ((old, new) if version == 1 else (new, old))
                )
                # A GPU's float32 attention rounds its products to fewer bits.
                assert mine.max() < 0.1
                assert mine.mean() < 0.01
                assert end is not None or first > 200 or others.mean() > 5 * mine.mean()
    assert switched
