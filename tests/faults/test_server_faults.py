"""Servers and trainers that die at the worst moment: each ends in recovery or in one clear error, in time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from serving.servers import KEY, start_server, until

from slipstream.generation.engine import EngineLostError, Request, Sampling
from slipstream.generation.server import ServerEngine
from slipstream.weights.plan import WeightUpdateError

SAMPLING = Sampling(max_tokens=8, temperature=0.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", KEY)


@pytest.fixture
def start(tiny_model):
    """Starts servers; those that live at the end, also at that of a test that failed, are ended."""
    started = []

    def start(*options):
        started.append(start_server(tiny_model, *options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def weights(model, seed):
    """A model of other random weights, and its named tensors."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def greedy(model, prompt, tokens=8):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def kill(server):
    """End the server as the kernel would: without a word."""
    server.process.kill()
    server.process.wait(10)


def make_trainer(model, folder, port, **settings):
    from datasets import Dataset

    from slipstream import GRPOConfig, GRPOTrainer

    rows = [{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]
    args = GRPOConfig(
        str(folder), use_vllm=True, vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=port,
        vllm_server_timeout=90, max_steps=3, num_generations=4, per_device_train_batch_size=16, learning_rate=3e-3,
        max_completion_length=200, vllm_max_model_length=256, report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, html_report=False, gradient_checkpointing=False, use_cpu=True, **settings,
    )  # fmt: skip

    def digits(completions, **_):
        return [sum(c.isdigit() for c in text) / 200 for text in completions]

    return GRPOTrainer(str(model), digits, args, Dataset.from_list(rows))


def test_a_server_killed_while_it_generates_costs_nothing_but_time(tiny_model, tmp_path, start):
    """The trainer is there first, the server comes, is killed in the middle of a step, and comes again."""
    port = free_port()
    servers = []

    def serve():
        servers.append(start("--port", port))

    first = threading.Thread(target=serve)
    first.start()  # takes seconds; the trainer waits for it
    disturbed = make_trainer(tiny_model, tmp_path / "disturbed", port)
    first.join()

    def disturb():
        client = disturbed.engine._client
        until(lambda: disturbed.state.global_step >= 1 and client.server_info().replicas[0].running, 60, servers[0])
        kill(servers[0])
        serve()

    disturbance = threading.Thread(target=disturb)
    disturbance.start()
    disturbed.train()
    disturbance.join()
    assert len(servers) == 2

    calm = make_trainer(tiny_model, tmp_path / "calm", port)
    calm.train()
    for ours, theirs in zip(calm.model.parameters(), disturbed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    rewards = [[e["reward"] for e in t.state.log_history if "reward" in e] for t in (calm, disturbed)]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 3
    for made in (calm, disturbed):
        made.close()


def test_a_server_that_never_comes_is_one_error_in_time():
    port = free_port()
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"127\.0\.0\.1:{port}.*slipstream vllm-serve"):
        ServerEngine(f"http://127.0.0.1:{port}", device=CPU, timeout=2)
    assert time.monotonic() - begin < 10


def test_a_push_that_is_cut_off_leaves_the_old_weights(tiny_model, start):
    """Killed on either side: a trainer in the middle of sending, then the server itself."""
    server = start()
    engine = ServerEngine(server.url, device=CPU, timeout=60)
    old, new = weights(tiny_model, 1), weights(tiny_model, 2)
    engine.update_weights(1, old.named_parameters())
    prompt = list(range(10, 20))
    assert engine.generate([Request(prompt)], SAMPLING)[0][0].ids == greedy(old, prompt)

    # A trainer that dies while it sends.
    script = f"""
import os, signal, torch
from slipstream import VLLMClient
from slipstream.weights.export import named_tensors
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r}, dtype=torch.float32)
sent = list(named_tensors(model))
class Dying:
    def __iter__(self):
        yield from sent[:5]
        os.kill(os.getpid(), signal.SIGKILL)
client = VLLMClient(base_url={server.url!r})
client.init_communicator("cpu", "group")
from slipstream.serving.wire import TensorSpec
specs = [TensorSpec(n, "float32", tuple(t.shape)) for n, t in sent]
client.update_weights(9, Dying(), specs=specs)
"""
    environment = os.environ | {"SLIPSTREAM_API_KEY": KEY}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert engine.generate([Request(prompt)], SAMPLING)[0][0].ids == greedy(old, prompt)

    # One whose weights are not finite: refused whole.
    broken = weights(tiny_model, 3)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(WeightUpdateError, match="not finite"):
        engine.update_weights(2, broken.named_parameters())
    engine.version = 1
    assert engine.generate([Request(prompt)], SAMPLING)[0][0].ids == greedy(old, prompt)

    # The next trainer is taken.
    engine.update_weights(3, new.named_parameters())
    assert engine.generate([Request(prompt)], SAMPLING)[0][0].ids == greedy(new, prompt)

    # The server dies in the middle of a push; another one comes in its place.
    def cut_off():
        for count, item in enumerate(new.named_parameters()):
            if count == 5:
                kill(server)
            yield item

    port = server.port
    with pytest.raises(EngineLostError):
        engine.update_weights(4, cut_off())
    server = start("--port", port)
    engine.recover()
    assert engine.version is None
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.generate([Request(prompt)], SAMPLING)
    engine.update_weights(4, new.named_parameters())
    assert engine.generate([Request(prompt)], SAMPLING)[0][0].ids == greedy(new, prompt)
    with pytest.raises(ValueError, match=r"300 .*256"):
        engine.generate([Request(list(range(10, 100)) * 3 + list(range(30)))], SAMPLING)
    engine.close()
