"""Weights of a policy in float32, and buffers among them, in a real server that computes in 16 bits."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import tiny
import torch
from integration import engines
from serving.servers import start_server

from slipstream import VLLMClient
from slipstream.generation.engine import Request, Sampling
from slipstream.generation.server import ServerEngine
from slipstream.serving.wire import TensorSpec
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(3, 20)


@pytest.fixture(scope="module")
def gemma():
    model = engines.gemma()
    model.model.layers[0].layer_scalar.fill_(0.3)  # which bfloat16 does not have
    return model


@pytest.fixture(scope="module")
def server(gemma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    engines.step(gemma, seed=1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    started = start_server(folder, "--dtype", "bfloat16")
    yield started
    started.stop()


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
    with VLLMClient(base_url=server.url) as made:
        yield made


def sampled(client):
    answer = client.generate(PROMPTS, max_tokens=16, temperature=0.0)
    return answer["completion_ids"], answer["logprobs"]


@pytest.mark.parametrize("transport", ["shared_memory", "body", "group"])
def test_what_is_sent_in_float32_is_held_as_if_it_had_been_cast_before(client, gemma, transport):
    tensors = [(name, tensor.clone()) for name, tensor in named_tensors(gemma)]
    client.init_communicator("cpu", transport)
    client.update_weights(1, tensors)
    exact = sampled(client)
    client.update_weights(2, [(name, tensor * 1.1) for name, tensor in tensors])  # or the next one might do nothing
    assert sampled(client) != exact
    tensors = [(name, tensor.bfloat16()) for name, tensor in tensors]
    client.update_weights(3, tensors, specs=[TensorSpec(n, "bfloat16", tuple(t.shape)) for n, t in tensors])
    rounded = sampled(client)
    assert exact == rounded


def test_a_server_as_an_engine_takes_buffers_and_misses_them(server, client, gemma):
    made = ServerEngine(server.url, device=torch.device("cpu"), timeout=60)
    report = made.update_weights(4, named_tensors(gemma))
    assert report.nbytes == sum(4 * tensor.numel() for _, tensor in named_tensors(gemma))  # small ones stay float32
    rounded = engines.gemma()
    rounded.load_state_dict({name: t.bfloat16().float() for name, t in gemma.state_dict().items()})
    answers = made.generate([Request(p) for p in PROMPTS], Sampling(8, temperature=1.0))
    for prompt, [completion] in zip(PROMPTS, answers, strict=True):
        difference = engines.logprobs(rounded, prompt, completion.ids) - torch.tensor(completion.logprobs)
        assert difference.abs().max() < 0.2  # an engine of 16 bits; one that lacks the scalars is off by whole nats
    made.close()
    scalar = "model.layers.1.layer_scalar"
    with pytest.raises(WeightUpdateError, match=f"the engine is unchanged: missing: {scalar}"):
        client.update_weights(5, [(name, tensor) for name, tensor in named_tensors(gemma) if name != scalar])


@pytest.mark.parametrize("transport", ["shared_memory", "group"])
def test_a_buffer_may_be_infinite_but_not_a_number(client, gemma, transport):
    """As the limits of a clamp are that has none: Gemma 4's towers have such."""
    scalar = "model.layers.1.layer_scalar"

    def push(name, value):
        tensors = dict(named_tensors(gemma)) | {name: torch.full_like(dict(named_tensors(gemma))[name], value)}
        client.update_weights(6, list(tensors.items()))

    client.init_communicator("cpu", transport)
    push(scalar, float("inf"))
    for name, value in ((scalar, float("nan")), ("model.norm.weight", float("inf"))):
        with pytest.raises(WeightUpdateError, match=rf"is unchanged: values that are not finite .* in {name}"):
            push(name, value)
