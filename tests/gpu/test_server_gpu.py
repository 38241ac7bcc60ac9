"""A server's engine on an NVIDIA GPU, where it is a process of its own: its decode steps as CUDA graphs, and whose
weights sampled which token."""

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


def test_decode_steps_are_graphs(tmp_path):
    path = tiny.build(tmp_path / "small", hidden=256, layers=4)
    changed = engines.step(engines.policy(path), seed=1, scale=0.02)
    requests = [Request(p, n=8, seed=100 * i) for i, p in enumerate(PROMPTS)]
    natural = Sampling(96, extra={"stop_token_ids": [7, 30, 61, 99]})
    found = {}
    for switch in ("1", "0"):
        server = start_server(
            path, "--gpu-memory-utilization", "0.2", "--dtype", "bfloat16", timeout=300,
            env={"SLIPSTREAM_STEADY_DECODE": switch},
        )  # fmt: skip
        try:
            with VLLMClient(base_url=server.url, api_key=server.key) as client:
                client.init_communicator("cpu")
                answers = [client.sample(requests, sampling) for sampling in (natural, LONG)]
                client.update_weights(1, named_tensors(changed.bfloat16()))
                answers.append(client.sample(requests, natural))
            found[switch] = [[(c.ids, c.logprobs, c.finish_reason) for g in a for c in g] for a in answers]
            # Said when the first step is made of them.
            assert ("steady steps: graphs of" in server.output()) is (switch == "1")
        finally:
            server.stop()
    for mine, others in zip(found["1"], found["0"], strict=True):
        # In which steps the first requests arrive is not the same in two runs, and with it the batches' rounding.
        assert sum(a == b for a, b in zip(mine, others, strict=True)) >= 0.9 * len(mine)
        assert all(len(ids) == len(logps) for ids, logps, _ in mine)
    assert found["1"][0] != found["1"][2]


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
