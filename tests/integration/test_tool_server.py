"""Calls of tools with a server that samples, and with one that is lost between two turns."""

from __future__ import annotations

from importlib.util import find_spec

import calling
import pytest
import torch
from serving.servers import start_server

from slipstream.generation.engine import EngineLostError

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def server(calling_model):
    started = start_server(calling_model)
    yield started
    started.stop()


class Notes:
    """An environment that may be left in the middle."""

    def reset(self, **_):
        self.sums = []

    def add(self, a: int, b: int) -> int:
        """Add two numbers, and keep the sum.

        Args:
            a: The first.
            b: The second.
        """
        self.sums.append(a + b)
        return a + b


def train(model, folder, lose=False, **settings):
    """What a run comes to: weights and metrics."""
    noted = []

    def reward(completions, environments, **_):
        noted.extend(len(environment.sums) for environment in environments)
        assert noted[-len(completions) :] == [sum(m["role"] == "tool" for m in c) for c in completions]
        return [float(len(str(messages))) for messages in completions]

    trainer = calling.trainer(
        model, folder, reward, None, environment_factory=Notes, use_vllm=True, vllm_max_model_length=256, max_steps=3,
        temperature=1.1, use_cpu=True, **settings,
    )  # fmt: skip
    generate, asked = trainer.engine.generate, []

    def noting(requests, *arguments):
        asked.append(len(requests))
        if lose and len(asked) == 5:
            raise EngineLostError("lost by the test")
        return generate(requests, *arguments)

    trainer.engine.generate = noting
    trainer.train()
    trainer.close()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    names = ("reward", "tools/call_frequency", "completions/mean_length", "num_tokens")
    history = [[entry[name] for name in names] for entry in trainer.state.log_history if "reward" in entry]
    return weights, history, noted, asked


def test_a_server_gives_what_an_engine_in_the_process_does(calling_model, tmp_path, server, monkeypatch):
    """Also where it is lost between two turns: all turns begin again, with environments that are reset."""
    monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
    there = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    here = train(calling_model, tmp_path / "here")
    calm = train(calling_model, tmp_path / "calm", **there)
    lost = train(calling_model, tmp_path / "lost", lose=True, **there)
    assert (calm[0] - here[0]).abs().max() < 1e-6
    assert calm[1:] == here[1:]
    assert sum(here[2]) > 6
    assert torch.equal(calm[0], lost[0])
    assert calm[1:3] == lost[1:3]
    begins = [i for i, count in enumerate(lost[3]) if count == 6]
    assert len(lost[3]) > len(calm[3])
    assert lost[3][:4] == calm[3][:4]
    assert begins
