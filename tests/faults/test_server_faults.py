"""Servers and trainers that die at the worst moment: each ends in recovery or in one clear error, in time."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from serving.servers import KEY, start_server, until

from slipstream.generation.engine import Request, Sampling
from slipstream.generation.server import ServerEngine
from slipstream.serving.client import VLLMClient
from slipstream.trainers import generating
from slipstream.weights.plan import WeightUpdateError

SAMPLING = Sampling(max_tokens=8, temperature=0.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", KEY)


class House:
    """A port, and the server that listens on it: tests that kill one leave the next test another."""

    def __init__(self, model):
        self.model, self.server = model, None
        self.held, self.port = held_port()

    def serve(self):
        """The server; it is started if none lives."""
        if self.server is None or self.server.process.poll() is not None:
            self.server = start_server(self.model, "--port", self.port)
        return self.server

    def kill(self):
        """End the server as the kernel would: without a word."""
        self.server.process.kill()
        self.server.process.wait(60)

    def replace(self):
        """Kill the server, if there is one; another is started meanwhile. Join the thread that is returned."""
        if self.server is not None:
            self.kill()
        thread = threading.Thread(target=self.serve)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def house(tiny_model):
    made = House(tiny_model)
    yield made
    if made.server is not None and made.server.process.poll() is None:
        made.server.stop()
    made.held.close()


def held_port():
    """A socket, and its port, which nobody else is given while it is open; a server may listen there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


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


def dying_trainer(house, moment):
    """A trainer connects through a process group and is killed while it is `sending`, or once it has sent all and is
    `idle`."""
    script = f"""
import os, signal
from safetensors.torch import load_file
from slipstream import VLLMClient
from slipstream.weights.buckets import specs_of
tensors = list(load_file({str(house.model / "model.safetensors")!r}).items())
class Dying:
    def __iter__(self):
        yield from tensors[:5]
        os.kill(os.getpid(), signal.SIGKILL)
client = VLLMClient(base_url={house.server.url!r}, connection_timeout=60)
client.init_communicator("cpu", "group")
client.update_weights(9, Dying() if {moment!r} == "sending" else tensors, specs=specs_of(tensors, "float32"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def connections(server):
    """Network connections of the server's replicas and their workers, those included that wait to be closed."""
    return sum(len(process.net_connections("tcp")) for process in server.children())


def make_trainer(house, folder, rollout_func=None, **settings):
    from datasets import Dataset

    from slipstream import GRPOConfig, GRPOTrainer

    rows = [{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]
    args = GRPOConfig(
        str(folder), use_vllm=True, vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=house.port,
        vllm_server_timeout=90, num_generations=4, per_device_train_batch_size=16, learning_rate=3e-3,
        vllm_max_model_length=256, report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, html_report=False, gradient_checkpointing=False, use_cpu=True,
        **{"max_steps": 3, "max_completion_length": 200} | settings,
    )  # fmt: skip

    def digits(completions, **_):
        return [sum(c.isdigit() for c in text) / 200 for text in completions]

    return GRPOTrainer(str(house.model), digits, args, Dataset.from_list(rows), rollout_func=rollout_func)


def outcome(trainer):
    """What a run has come to: its weights and the rewards of its steps. The trainer is closed."""
    trainer.close()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == trainer.args.max_steps
    return [p.detach() for p in trainer.model.parameters()], rewards


def assert_same(one, other):
    """Bit for bit."""
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(ours, theirs)
    assert one[1] == other[1]


@pytest.fixture(scope="module")
def calm(house, tmp_path_factory):
    """What a run comes to that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_API_KEY", KEY)
        house.serve()
        made = make_trainer(house, tmp_path_factory.mktemp("calm"))
        made.train()
    return outcome(made)


def test_a_server_killed_while_it_generates_costs_nothing_but_time(tmp_path, house, request, monkeypatch):
    """The trainer is there first, the server comes, is killed in the middle of a step, and comes again."""
    arrival = house.replace()
    made = make_trainer(house, tmp_path)  # waits for it
    arrival.join()
    arrivals = []
    stream = VLLMClient.stream

    def disturbed(*arguments, **options):
        for completion in stream(*arguments, **options):
            yield completion  # the others are still to come
            if made.state.global_step >= 1 and not arrivals:
                arrivals.append(house.replace())

    monkeypatch.setattr(VLLMClient, "stream", disturbed)
    made.train()
    arrivals[0].join()
    assert_same(outcome(made), request.getfixturevalue("calm"))


def test_a_server_killed_while_it_takes_weights_costs_nothing_but_time(tmp_path, house, calm, monkeypatch):
    """Twice: while they come through shared memory, and while they come through a process group."""
    house.serve()
    made = make_trainer(house, tmp_path)
    arrivals, sent = [], []

    class Weights(generating.Weights):
        def __iter__(self):
            for count, item in enumerate(super().__iter__()):
                if count == 5 and made.state.global_step == 1 + len(arrivals):
                    arrivals.append(house.replace())
                yield item

    connect, update = VLLMClient.init_communicator, VLLMClient.update_weights

    def send(client, version, *arguments, **options):
        sent.append((version, client._sender()._transport))
        return update(client, version, *arguments, **options)

    monkeypatch.setattr(generating, "Weights", Weights)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: connect(
        client, device, "group" if arrivals else None))  # fmt: skip
    monkeypatch.setattr(VLLMClient, "update_weights", send)
    made.train()
    for arrival in arrivals:
        arrival.join()
    assert sent == [(0, "shared_memory"), (1, "shared_memory"), (1, "group"), (2, "group"), (2, "group")]
    assert_same(outcome(made), calm)


def test_a_server_killed_while_a_rollout_func_asks_it_is_asked_again(tmp_path, house):
    calls = []

    def run(folder, disturb):
        def rollout_func(prompts, trainer):
            """One completion a prompt, each in a call of its own."""
            calls.append((trainer.state.global_step, trainer.engine.version, prompts))
            ids, answers = trainer.processing_class(prompts)["input_ids"], []
            for i, prompt in enumerate(ids):
                if disturb and len(calls) == 2 and i == len(ids) // 2:
                    arrivals.append(house.replace())
                [[answer]] = trainer.engine.generate([Request(prompt, 1, 100 * i)], trainer.args.sampling())
                answers.append(answer)
            return {
                "prompt_ids": ids, "completion_ids": [a.ids for a in answers],
                "logprobs": [a.logprobs for a in answers],
            }  # fmt: skip

        house.serve()
        arrivals = []
        made = make_trainer(house, folder, rollout_func, max_steps=2, max_completion_length=8)
        made.train()
        for arrival in arrivals:
            arrival.join()
        return outcome(made)

    disturbed = run(tmp_path / "disturbed", True)
    assert [call[:2] for call in calls] == [(0, 0), (1, 1), (1, 1)]
    assert calls[1] == calls[2]
    assert_same(run(tmp_path / "calm", False), disturbed)


def test_a_server_that_never_comes_is_one_error_in_time():
    held, port = held_port()  # nobody listens there
    begin = time.monotonic()
    with held, pytest.raises(ConnectionError, match=rf"127\.0\.0\.1:{port}.*slipstream vllm-serve"):
        ServerEngine(f"http://127.0.0.1:{port}", device=CPU, timeout=2)
    assert time.monotonic() - begin < 30


def test_a_push_that_is_cut_off_leaves_the_old_weights(tiny_model, house):
    server = house.serve()
    engine = ServerEngine(server.url, device=CPU, timeout=60)
    old, new = weights(tiny_model, 1), weights(tiny_model, 2)
    prompt = list(range(10, 20))
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.generate([Request(prompt)], SAMPLING)
    engine.update_weights(1, old.named_parameters())
    assert engine.generate([Request(prompt)], SAMPLING)[0][0].ids == greedy(old, prompt)

    dying_trainer(house, "sending")
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
    with pytest.raises(ValueError, match=r"300 .*256"):
        engine.generate([Request(list(range(10, 100)) * 3 + list(range(30)))], SAMPLING)
    engine.close()


def test_a_trainer_killed_while_it_is_idle_makes_way_for_the_next(tiny_model, house):
    server = house.serve()
    new, prompt = weights(tiny_model, 4), list(range(10, 20))
    before = connections(server)
    dying_trainer(house, "idle")
    assert connections(server) > before, "its group is not there, or was freed already: nothing is left to test"
    with VLLMClient(base_url=server.url, connection_timeout=60) as client:
        assert client.server_info().version == 9
        begin = time.monotonic()
        client.init_communicator("cpu", "group")
        client.update_weights(10, list(new.named_parameters()))
        assert time.monotonic() - begin < 60  # it does not wait for the dead one's deadline
        [answer] = client.generate([prompt], max_tokens=8, temperature=0.0)["completion_ids"]
        assert answer == greedy(new, prompt)
        client.close_communicator()
    # Nothing of the two groups is left.
    until(lambda: connections(server) == before, 60, server)
