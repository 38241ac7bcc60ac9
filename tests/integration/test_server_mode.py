"""Training against `slipstream vllm-serve`: the same run as in colocate mode, on one rank and on several."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import pytest
import rounds
import torch
from launching import torchrun
from safetensors.torch import load_file
from serving.servers import start_server

from slipstream import VLLMClient
from slipstream.generation import server as engines
from slipstream.serving import joining
from slipstream.serving.connection import Connection
from slipstream.weights.transports import group

SCRIPT = Path(__file__).parents[1] / "distributed" / "run_grpo.py"


@pytest.fixture(scope="module")
def server(tiny_model):
    started = start_server(tiny_model)
    yield started
    started.stop()


def train(model, folder, server=None, ranks=1, **settings):
    """Train two steps, with an evaluation before and after; return the saved tensors, rank 0's log, and what was
    sampled by all ranks: the greedy completions of the evaluations, and those of the steps."""
    folder.mkdir()
    key = {}
    if server is not None:
        key["SLIPSTREAM_API_KEY"] = server.key
        settings |= {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 240}
    settings = {"per_device_train_batch_size": 12 // ranks} | settings
    settings = {"max_steps": 2, "use_cpu": True, "eval_on_start": True} | settings
    started = torchrun(SCRIPT, model, folder, json.dumps(settings), ranks=ranks, **key)
    done = subprocess.run(**started, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    # An evaluation is padded to whole batches of all ranks: a set has each of its rows once.
    sampled = {
        (step, prompt, tuple(ids))
        for file in folder.glob("sampled*.json")
        for step, prompt, ids in json.loads(file.read_text())
    }
    return load_file(folder / "model.safetensors"), json.loads((folder / "rank0.json").read_text()), sampled


@pytest.fixture(scope="module")
def colocated(tiny_model, tmp_path_factory):
    return train(tiny_model, tmp_path_factory.mktemp("colocated") / "run")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_against_a_server_learns_what_a_colocated_one_does(tiny_model, tmp_path, server, colocated, ranks):
    tensors, history, sampled = train(tiny_model, tmp_path / "run", server, ranks)
    for name, value in colocated[0].items():
        assert (tensors[name] - value).abs().max() < 1e-5, name
    # Token by token: sampled ones of both steps, and greedy ones of the weights before and after them.
    assert sampled == colocated[2]
    assert {step for step, _, _ in sampled} == {0, 1, 2}
    # Sampled and greedy (evaluation) rewards, before and after the weights went through shared memory.
    for name in ("reward", "reward_std", "completions/mean_length", "num_tokens", "eval_reward"):
        expected = [entry[name] for entry in colocated[1] if name in entry]
        assert [entry[name] for entry in history if name in entry] == pytest.approx(expected, abs=1e-5), name
    assert max(e["sampling/sampling_logp_difference/max"] for e in history if "loss" in e) < 1e-4
    assert all(e["sync/bytes"] > 0 for e in history if "sync/bytes" in e)
    assert any("sync/bytes" in e for e in history)
    # Each rank asks for its own share: of 7 prompts that are evaluated, and of the 12 completions of a step.
    for rank in range(ranks):
        asked = json.loads((tmp_path / "run" / f"asked{rank}.json").read_text())
        assert asked == ([7, 12, 12, 7] if ranks == 1 else [4, 6, 6, 4])


def trainer(model, folder, server, **settings):
    from datasets import Dataset

    from slipstream import GRPOConfig, GRPOTrainer

    rows = [{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]
    args = GRPOConfig(
        str(folder), use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url, max_steps=2, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=8, vllm_max_model_length=64, report_to=[], logging_steps=1,
        save_strategy="no", disable_tqdm=True, html_report=False, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return GRPOTrainer(str(model), lambda completions, **_: [float(len(c)) for c in completions], args,
                       Dataset.from_list(rows))  # fmt: skip


def test_the_server_serves_the_trainers_version(tiny_model, tmp_path, server, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
    made = trainer(tiny_model, tmp_path, server)
    made.train()
    made.push_weights()
    assert made.engine.version == 2
    with VLLMClient(base_url=server.url) as client:
        assert client.server_info().version == 2
        # The last weights of the run, as transformers computes them.
        prompt = made.renderer.render({"prompt": "3+4="}, 0).ids
        answer = client.generate([prompt], max_tokens=8, temperature=0.0)
    ids = torch.tensor([prompt])
    made.model.eval()
    expected = made.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert answer["completion_ids"][0] == expected[0, len(prompt) :].tolist()
    made.close()


def test_a_server_that_is_too_short_is_refused_at_the_start(tiny_model, tmp_path, server, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
    from slipstream.generation.server import ServerEngine

    with pytest.raises(ValueError, match=r"vllm_max_model_length=1024, but the server .* --max-model-len 256"):
        ServerEngine(server.url, device=torch.device("cpu"), timeout=60, max_model_len=1024)


class TestTheServersLength:
    """Where vllm_max_model_length is not set, the server's own limit holds: 256 tokens. The model could take 512."""

    @pytest.fixture(autouse=True)
    def there(self, server, monkeypatch):
        monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
        self.rows = [*rounds.ROWS, {"prompt": "1" * 300, "solution": "1"}]
        self.where = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}

    def test_a_pairwise_trainer_asks_for_no_more(self, tiny_model, tmp_path):
        with pytest.warns(UserWarning, match="more than the server's --max-model-len of 256. They are skipped"):
            made = rounds.make("OnlineDPO", tiny_model, tmp_path, rows=self.rows, max_steps=1, **self.where)
        made.train()
        made.close()
        assert (made.args.vllm_max_model_length, made.args.max_length) == (None, 512)
        assert len(made.train_dataset) == len(rounds.ROWS)
        assert made.state.global_step == 1

    def test_a_prompt_that_does_not_fit_is_an_error_before_the_model_loads(self, tiny_model, tmp_path):
        (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
        for file in tiny_model.glob("token*"):
            (tmp_path / file.name).write_text(file.read_text())
        with pytest.raises(ValueError, match=r"than the server's --max-model-len of 256\. .*raise the server's --max"):
            rounds.make("RLOO", tmp_path, tmp_path, rows=self.rows, **self.where)


def test_a_wrong_key_is_refused_at_once(tiny_model, tmp_path, server, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "not-the-key-of-this-server")
    with pytest.raises(PermissionError, match="SLIPSTREAM_API_KEY"):
        trainer(tiny_model, tmp_path, server)


def test_the_servers_own_accelerator_is_refused_before_a_group_is_made(tiny_model, tmp_path, server, monkeypatch):
    """A CPU has no UUID: both sides are given one where it is asked for."""
    monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
    asked, get, post, engine = [], Connection.get, Connection.post, engines.ServerEngine

    def get_from_an_accelerator(connection, path, kind):
        info = get(connection, path, kind)
        replicas = [msgspec.structs.replace(replica, devices=["0a1b-server"]) for replica in info.replicas]
        return msgspec.structs.replace(info, platform="cuda", replicas=replicas)

    def post_noted(connection, path, *arguments, **options):
        asked.append(path)
        return post(connection, path, *arguments, **options)

    monkeypatch.setattr(Connection, "get", get_from_an_accelerator)
    monkeypatch.setattr(Connection, "post", post_noted)
    monkeypatch.setattr(group, "join", lambda *_: pytest.fail("a group was started"))
    monkeypatch.setattr(engines, "uuid_of", lambda device: "GPU-0A1B-server")
    monkeypatch.setattr(joining, "uuid_of", lambda device: "GPU-0A1B-server")
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(engines, "ServerEngine", lambda url, **options: engine(url, **options | {"device": cuda}))
    message = r"same accelerator: 0a1b-server \(the trainer has 0a1b-server; the server has 0a1b-server\)"
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model, tmp_path, server)
    with VLLMClient(base_url=server.url) as client, pytest.raises(ValueError, match=message):
        client.init_communicator(cuda)
    assert asked == []
    assert not torch.distributed.is_initialized()
