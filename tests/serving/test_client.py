"""The client against a real server with a tiny model: completions, weights by every transport, and what goes wrong."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
import tiny
import torch
from serving.pretend import answering
from serving.servers import start_server, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from slipstream.generation.engine import Request, Sampling
from slipstream.serving.client import RefusedError, ServerError, VLLMClient
from slipstream.serving.devices import check_devices_apart
from slipstream.serving.wire import (
    BeginMessage,
    BeginReply,
    CommunicatorMessage,
    CommunicatorReply,
    ProgressMessage,
    TensorSpec,
)
from slipstream.weights.buckets import specs_of
from slipstream.weights.plan import WeightUpdateError

PROMPTS = [[5, 20, 30, 40], [7, 8], [9, 10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def original(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def client(server, original):
    with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as made:
        made.update_weights(next_version(made), named(original))
        yield made


@pytest.fixture
def changed(original, request):
    """The model with other weights, different ones for each test."""
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() / 2)
    return model


def greedy(model, prompts=PROMPTS, tokens: int = 16) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def served(client, prompts=PROMPTS, tokens: int = 16) -> list[list[int]]:
    return client.generate(prompts, temperature=0.0, max_tokens=tokens)["completion_ids"]


def named(model) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def next_version(client) -> int:
    return client.server_info().version + 1


# Completions ---------------------------------------------------------------------------------------------------------


def test_generate_answers_in_the_shapes_that_trl_users_know(client, original):
    answer = client.generate(PROMPTS, n=2, temperature=0.7, top_p=0.9, top_k=50, max_tokens=8)
    assert answer["prompt_ids"] == PROMPTS
    assert len(answer["completion_ids"]) == 6
    assert all(1 <= len(ids) <= 8 for ids in answer["completion_ids"])
    assert answer["logprob_token_ids"] == [[[i] for i in ids] for ids in answer["completion_ids"]]
    for ids, logprobs in zip(answer["completion_ids"], answer["logprobs"], strict=True):
        assert len(ids) == len(logprobs)
        assert all(len(position) == 1 and position[0] <= 0 for position in logprobs)
    assert client.generate(PROMPTS, max_tokens=2, logprobs=None)["logprobs"] is None
    assert served(client) == greedy(original)


def test_a_prompt_that_is_no_list_is_not_read_letter_by_letter(client):
    with pytest.raises(TypeError, match="prompts='two' would be read letter by letter"):
        client.generate("two")


def test_logprobs_are_the_models(client, original):
    answer = client.generate([PROMPTS[0]], temperature=1.0, max_tokens=12)
    [ids] = answer["completion_ids"]
    with torch.no_grad():
        logits = original(torch.tensor([PROMPTS[0] + ids])).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)[range(len(ids)), ids]
    got = torch.tensor([position[0] for position in answer["logprobs"][0]])
    assert (got - expected).abs().max() < 1e-5


def test_text_and_conversations_are_rendered_by_the_server(client, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert client.generate(["2+2="], max_tokens=1)["prompt_ids"] == [tokenizer("2+2=").input_ids]
    conversations = [[{"role": "user", "content": "hi"}], [{"role": "system", "content": "be"}]]
    for variables in ({}, {"hint": "42"}):
        answer = client.chat(conversations, n=2, max_tokens=3, chat_template_kwargs=variables)
        assert answer["prompt_ids"] == [
            tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False, **variables)
            for c in conversations
        ]
        assert len(answer["completion_ids"]) == len(answer["logprobs"]) == 4


@pytest.mark.parametrize(
    "variables",
    [{"chat_template": "{{ 7 * 7 }}"}, {"padding": "max_length", "max_length": 200}, {"tokenizer_kwargs": {}}],
)
def test_the_template_is_the_models_and_its_variables_are_the_clients(client, variables):
    with pytest.raises(RefusedError, match=f"chat_template_kwargs: {min(variables)}.* only variables of the template"):
        client.chat([[{"role": "user", "content": "hi"}]], chat_template_kwargs=variables)


def test_weights_of_another_trainer_are_not_sampled_from(client, server, original, changed):
    """Both call theirs by the same version; so does a server that was started again."""
    version = next_version(client)
    ours = client.update_weights(version, named(original))
    requests, sampling = [Request(PROMPTS[0])], Sampling(max_tokens=2)
    assert client.sample(requests, sampling, version, ours.update)
    with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as other:
        theirs = other.update_weights(version, named(changed))
        assert theirs.update != ours.update
        assert other.sample(requests, sampling, version, theirs.update)
    with pytest.raises(ServerError, match=f"other weights of version {version} serve .* another trainer") as caught:
        client.sample(requests, sampling, version, ours.update)
    assert caught.value.status == 409


def test_sampling_options_reach_the_engine(client):
    answer = client.generate(["1"], max_tokens=5, structured_outputs_regex="[ab]{5}")
    assert set(tiny.tokenizer().decode(answer["completion_ids"][0])) <= set("ab")
    given = {"structured_outputs": {"regex": "[cd]{5}"}}
    answer = client.generate(["1"], max_tokens=5, generation_kwargs=given)
    assert set(tiny.tokenizer().decode(answer["completion_ids"][0])) <= set("cd")
    with pytest.raises(RefusedError, match="unknown option in structured_outputs: 'rgx'"):
        client.generate(["1"], generation_kwargs={"structured_outputs": {"rgx": "a"}})
    stopped = client.generate(PROMPTS, max_tokens=8, generation_kwargs={"stop_token_ids": list(range(128))})
    assert [len(ids) for ids in stopped["completion_ids"]] == [1, 1, 1]
    with pytest.raises(ValueError, match="logprobs=3 is not allowed"):
        client.generate(PROMPTS, logprobs=3)


def test_samples_are_seeded_versioned_and_streamed(client):
    version = client.server_info().version
    requests = [Request(PROMPTS[0], n=3, seed=11), Request(PROMPTS[1], n=1)]
    sampling = Sampling(max_tokens=10)
    first = client.sample(requests, sampling, version=version)
    assert [len(row) for row in first] == [3, 1]
    assert all(c.weight_version == version and len(c.logprobs) == len(c.ids) for row in first for c in row)
    assert [c.ids for c in client.sample(requests[:1], sampling)[0]] == [c.ids for c in first[0]]
    alone = client.sample([Request(PROMPTS[0], seed=12)], sampling)
    assert alone[0][0].ids == first[0][1].ids  # sample i has seed + i
    streamed = {(prompt, sample) for prompt, sample, _ in client.stream(requests, sampling)}
    assert streamed == {(0, 0), (0, 1), (0, 2), (1, 0)}
    assert client.sample([], sampling) == []


def test_completions_come_as_soon_as_they_are_finished(client):
    requests = [Request(PROMPTS[0], seed=1), Request(PROMPTS[1], seed=1)]
    short = Sampling(max_tokens=200, extra={"ignore_eos": True})
    stream = client.stream([Request(PROMPTS[0], n=64, seed=1), *requests], short)
    next(stream)
    stream.close()  # ends the request: what is left of it is not sampled
    deadline = time.monotonic() + 60
    while client.server_info().replicas[0].running:
        assert time.monotonic() < deadline, "the server goes on sampling for nobody"


def test_another_version_and_wrong_prompts_are_refused(client):
    with pytest.raises(ServerError) as caught:
        client.sample([Request(PROMPTS[0])], Sampling(max_tokens=2), version=12345)
    assert caught.value.status == 409
    with pytest.raises(RefusedError, match="256") as caught:
        client.generate([[5] * 250], max_tokens=100)
    assert caught.value.status == 400
    with pytest.raises(ValueError, match="no_such_option"):
        client.generate(PROMPTS, generation_kwargs={"no_such_option": 1})
    assert served(client)[0]  # the server goes on


def test_many_threads_use_one_client(client):
    expected = served(client, tokens=8)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: served(client, [PROMPTS[i % 3]], 8)[0], range(48)))
    assert answers == [expected[i % 3] for i in range(48)]


def test_the_server_describes_itself(client, server):
    info = client.server_info()
    assert (info.dtype, info.max_model_len, info.platform) == ("float32", 256, "cpu")
    assert client.get_world_size() == 1
    assert client.health()
    client.reset_prefix_cache()
    with VLLMClient(host="0.0.0.0", server_port=server.port, api_key=server.key, connection_timeout=60) as other:
        assert other.base_url == server.url
        assert other.server_info().model == info.model


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [None, "shared_memory", "body", "group"])
def test_weights_arrive_by_every_transport(client, changed, transport):
    client.init_communicator("cpu", transport)
    version = next_version(client)
    report = client.update_weights(version, named(changed))
    assert (report.version, report.tensors) == (version, len(named(changed)))
    assert report.nbytes == sum(t.nbytes for _, t in named(changed))
    assert client.server_info().version == version
    assert served(client) == greedy(changed)
    client.close_communicator()


@pytest.mark.parametrize("transport", ["shared_memory", "body", "group"])
def test_a_generator_of_tensors_is_consumed_one_by_one(client, changed, transport, monkeypatch):
    monkeypatch.setattr("slipstream.serving.sender.BODY_BYTES", 64 << 10)  # several requests and buckets
    client.init_communicator("cpu", transport)
    tensors = named(changed)
    client.update_weights(next_version(client), (pair for pair in tensors), specs=specs_of(tensors, "float32"))
    assert served(client) == greedy(changed)
    client.close_communicator()


def test_where_no_memory_is_shared_the_weights_go_by_http(client, changed, monkeypatch):
    """A client on another machine finds no such file, or one with another nonce."""
    post = client._connection.post

    def elsewhere(path, message, kind, **options):
        reply = post(path, message, kind, **options)
        if isinstance(reply, BeginReply) and reply.path:
            reply.nonce = bytes(32)
        return reply

    monkeypatch.setattr(client._connection, "post", elsewhere)
    client.init_communicator("cpu")
    client.update_weights(next_version(client), named(changed))
    assert served(client) == greedy(changed)
    client.init_communicator("cpu", "shared_memory")
    with pytest.raises(WeightUpdateError, match="needs trainer and server on one machine"):
        client.update_weights(next_version(client), named(changed))
    assert client.server_info().transaction is None


def test_a_trainer_that_did_not_come_to_its_group_is_not_waited_for(client, changed):
    """It asked for a group, and died before it joined."""
    message = CommunicatorMessage(backend="gloo", timeout=300.0)
    client._connection.post("/communicator", message, CommunicatorReply)
    begin = time.monotonic()
    client.init_communicator("cpu", "group")
    client.update_weights(next_version(client), named(changed))
    assert time.monotonic() - begin < 60
    assert served(client) == greedy(changed)
    client.close_communicator()


def test_a_group_of_another_size_names_the_workers_that_there_are(client, changed, monkeypatch):
    """A replica has ended, or come up, between the two questions."""
    post = client._connection.post

    def post_to_more(path, message, kind, **options):
        reply = post(path, message, kind, **options)
        if isinstance(reply, CommunicatorReply):
            reply.world_size += 1
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(client._connection, "post", post_to_more)
        told = r"group is of 2 workers and this trainer, but the server's replicas .* \(replica 0 has 1\)"
        with pytest.raises(ConnectionError, match=told):
            client.init_communicator("cpu", "group")
    client.init_communicator("cpu", "group")
    client.update_weights(next_version(client), named(changed))
    assert served(client) == greedy(changed)
    client.close_communicator()


def test_trls_calls_are_one_update(client, changed):
    before = served(client)
    client.init_communicator("cpu")
    version = client.server_info().version
    for name, tensor in changed.named_parameters():
        client.update_named_param(name, tensor.data)
        if name.endswith("layers.0.mlp.up_proj.weight"):
            assert served(client) == before  # nothing is half updated
    client.reset_prefix_cache()
    assert client.server_info().version == version + 1
    assert served(client) == greedy(changed)


def test_weights_that_could_not_be_sent_are_kept_for_the_next_call(client, changed, monkeypatch):
    client.init_communicator("cpu")
    for name, tensor in changed.named_parameters():
        client.update_named_param(name, tensor.data)
    version = client.server_info().version
    with monkeypatch.context() as patch:
        patch.setattr(client, "_next_version", lambda: -1)
        with pytest.raises(WeightUpdateError):
            client.reset_prefix_cache()
    client.reset_prefix_cache()
    assert client.server_info().version == version + 1
    client.reset_prefix_cache()
    assert client.server_info().version == version + 1


def test_a_model_is_sent_whole(client, original, changed):
    client.update_named_param("model.norm.weight", original.model.norm.weight)  # older than what follows
    client.update_model_params(changed)
    client.reset_prefix_cache()
    assert served(client) == greedy(changed)


@pytest.mark.parametrize("transport", ["shared_memory", "body", "group"])
def test_a_push_that_is_interrupted_leaves_the_old_weights(client, original, changed, transport):
    client.init_communicator("cpu", transport)
    client.update_weights(next_version(client), named(original))
    version = client.server_info().version

    def breaking():
        yield from named(changed)[:10]
        raise RuntimeError("the trainer ran out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        client.update_weights(version + 1, breaking(), specs=specs_of(named(changed), "float32"))
    assert f"The server serves version {version} now" in "".join(caught.value.__notes__)
    info = client.server_info()
    assert (info.version, info.transaction) == (version, None)
    assert served(client) == greedy(original)
    client.update_weights(version + 1, named(changed))  # the next one works
    assert served(client) == greedy(changed)
    client.close_communicator()


@pytest.mark.parametrize("transport", ["shared_memory", "group"])
def test_weights_that_do_not_fit_are_refused_in_one_error(client, original, transport):
    client.init_communicator("cpu", transport)
    client.update_weights(next_version(client), named(original))
    version = client.server_info().version
    q, k, up, norm = (
        f"model.layers.1.{name}.weight"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm")
    )
    wrong = dict(named(original))
    del wrong[norm]
    wrong |= {
        "model.layers.7.extra.weight": torch.zeros(3), q: torch.zeros(5, 5), k: wrong[k].to(torch.int64),
        "b": wrong[up], up: wrong[up].double(),
    }  # fmt: skip
    for specs in (None, specs_of(wrong.items(), "float32")):
        with pytest.raises(WeightUpdateError) as caught:
            client.update_weights(version + 1, list(wrong.items()), specs=specs)
        for told in (
            "'model.layers.7.extra.weight' of shape (3,)", f"{q!r} of shape (5, 5)", "'b' of shape",
            f"missing: {norm}", "must be one of float32, bfloat16, float16", f"{k} (int64), {up} (float64)",
        ):  # fmt: skip
            assert told in str(caught.value)
    types = list((dict(named(original)) | {k: wrong[k]}).items())
    with pytest.raises(
        WeightUpdateError, match=rf"the engine is unchanged: of a type .*{k} \(int64\)\. The server serves"
    ):
        client.update_weights(version + 1, types)
    info = client.server_info()
    assert (info.version, info.transaction) == (version, None)
    assert served(client) == greedy(original)
    client.close_communicator()


def test_weights_that_are_not_finite_are_refused(client, original):
    client.init_communicator("cpu")
    client.update_weights(next_version(client), named(original))
    bad = named(copy.deepcopy(original))
    bad[3][1].view(-1)[0] = float("nan")
    with pytest.raises(WeightUpdateError, match=f"not finite.*{bad[3][0]}"):
        client.update_weights(next_version(client), bad)
    assert served(client) == greedy(original)


def test_a_transaction_of_another_trainer_is_a_conflict(client, server, changed, monkeypatch):
    client.init_communicator("cpu")
    tensors = named(changed)
    begun = client._connection.post(
        "/weights/begin", BeginMessage(version=99, tensors=specs_of(tensors, "float32")), BeginReply
    )
    monkeypatch.setattr("slipstream.serving.joining.TAKEOVER_SECONDS", 0.1)
    with VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60) as other:
        for call in (lambda: other.update_weights(100, tensors), lambda: other.init_communicator("cpu", "group")):
            # A silent one is not in the way for long.
            client._connection.call("POST", "/weights/progress", ProgressMessage(begun.transaction))
            with pytest.raises(ServerError) as caught:
                call()
            assert caught.value.status == 423
    assert client.server_info().transaction == begun.transaction
    client._sender()._give_up(begun.transaction)
    assert client.server_info().transaction is None


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_running_requests_go_on_or_are_waited_for(client, original, changed, mode):
    client.init_communicator("cpu")
    sampling = Sampling(max_tokens=200, extra={"ignore_eos": True})
    for _ in range(5):  # on a busy machine all, or no token, may be sampled before the push begins
        client.update_weights(next_version(client), named(original))
        old = client.server_info().version
        with ThreadPoolExecutor(1) as pool:
            sampled = pool.submit(client.sample, [Request(PROMPTS[0], n=48, seed=1)], sampling)
            deadline = time.monotonic() + 60
            while not (client.server_info().replicas[0].running or sampled.done()):
                assert time.monotonic() < deadline
            client.update_weights(old + 1, named(changed), mode=mode)
            [completions] = sampled.result(timeout=120)
        assert client.server_info().version == old + 1
        versions = {run[1] for c in completions for run in c.version_runs or ((0, c.weight_version),)}
        expected = {old, old + 1} if mode == "keep" else {old}
        if versions == expected:
            break
    assert versions == expected


def test_generating_needs_no_torch():
    code = "import slipstream.serving.client, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# What is not there ---------------------------------------------------------------------------------------------------


def test_no_server_is_an_error_that_says_how_to_start_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        port = taken.getsockname()[1]
        begin = time.monotonic()
        with pytest.raises(
            ConnectionError, match=f"no server at http://127.0.0.1:{port}.*vllm-serve --model MODEL"
        ) as caught:
            VLLMClient(server_port=port, api_key="k")
        assert "Waited" not in str(caught.value)
        assert time.monotonic() - begin < 30
        with pytest.raises(ConnectionError, match=r"Waited 1\.5 s for it"):
            VLLMClient(server_port=port, api_key="k", connection_timeout=1.5)
        assert 1 < time.monotonic() - begin < 30


def test_a_port_that_does_not_answer_is_an_error_at_the_deadline():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match="no server at"):
            VLLMClient(server_port=silent.getsockname()[1], api_key="k", connection_timeout=1)
        assert time.monotonic() - begin < 30


@contextmanager
def proxy(health, info, seconds=0.0):
    """The URL of one that answers these statuses, the latter after some seconds; and the calls that came there."""

    def answer(handler):
        time.sleep(seconds if handler.path == "/server_info" else 0)
        with contextlib.suppress(ConnectionError):  # who asked waits no longer
            handler.send_error(health if handler.path == "/health" else info)

    with answering(answer) as (port, asked):
        yield f"http://127.0.0.1:{port}", asked


@pytest.mark.parametrize(("health", "info"), [(502, 500), (504, 500), (200, 502), (200, 503), (200, 504)])
def test_a_proxy_without_a_server_behind_it_is_waited_for(health, info):
    for _ in range(5):  # on a busy machine there may be time for one question only, or for no answer
        begin = time.monotonic()
        with proxy(health, info) as (url, asked), pytest.raises(ConnectionError, match=r"Waited 0\.6 s") as caught:
            VLLMClient(base_url=url, api_key="k", connection_timeout=0.6)
        assert 0.5 < time.monotonic() - begin < 30
        if len(asked) > 2 and "is not ready" in str(caught.value):
            break
    assert len(asked) > 2
    assert "is not ready" in str(caught.value)


def test_a_server_that_is_slow_to_say_what_it_is_is_not_waited_for_longer():
    begin = time.monotonic()
    with proxy(200, 500, seconds=120) as (url, _), pytest.raises(ConnectionError, match=r"Waited 2 s for it"):
        VLLMClient(base_url=url, api_key="k", connection_timeout=2)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(("key", "message"), [("another-key", "does not accept this key"), ("", "wants a key")])
def test_a_wrong_key_is_an_error_that_says_where_keys_come_from(server, client, key, message, monkeypatch, tmp_path):
    monkeypatch.delenv("SLIPSTREAM_API_KEY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=f"{message}.*SLIPSTREAM_API_KEY"):
        VLLMClient(base_url=server.url, api_key=key or None, connection_timeout=60)


def test_urls_are_checked():
    with pytest.raises(ValueError, match="base_url='localhost:8000' is not allowed"):
        VLLMClient(base_url="localhost:8000")


def test_a_shared_accelerator_names_both_sides():
    check_devices_apart(["GPU-aaaa"], ["bbbb", "cccc"])
    with pytest.raises(ValueError, match=r"same accelerator: bbbb .*trainer has bbbb.*server has bbbb, cccc") as caught:
        check_devices_apart(["GPU-BBBB"], ["bbbb", "cccc"])
    assert "CUDA_VISIBLE_DEVICES=1 slipstream vllm-serve" in str(caught.value)


def test_a_server_that_dies_during_a_push_is_an_error_that_says_so(own_server, tiny_model, original):
    """And during generation: nothing waits for the dead, and nothing of it is left."""
    server = own_server
    client = VLLMClient(base_url=server.url, api_key=server.key, connection_timeout=60)
    client.init_communicator("cpu", "body")
    specs = specs_of(named(original), "float32")
    running = threading.Event()
    errors, files = [], []

    def generate() -> None:
        try:
            # More than can be sampled before the server is killed.
            for _ in client.stream([Request(PROMPTS[0], n=4000)], Sampling(200, extra={"ignore_eos": True})):
                running.set()
        except ConnectionError as error:
            errors.append(str(error))

    def dying():
        tensors = named(original)
        yield from tensors[:5]
        process = psutil.Process(server.process.pid)
        children = process.children(recursive=True)
        files.extend(file.path for file in process.open_files() if file.path.startswith("/dev/shm/slipstream"))
        server.process.kill()
        server.process.wait(60)
        assert not psutil.wait_procs(children, timeout=60)[1]  # they end with their server
        yield from tensors[5:]

    thread = threading.Thread(target=generate)
    thread.start()
    assert running.wait(60)
    with pytest.raises(ConnectionError, match=r"update to version 5 failed: .*cannot be asked what it serves"):
        client.update_weights(5, dying(), specs=specs)
    thread.join(60)
    assert len(errors) == 1
    assert "has ended" in errors[0]
    with pytest.raises(ConnectionError, match="vllm-serve"):
        client.wait(0.5)
    client.close()
    [file] = files
    again = start_server(tiny_model, wait=False)  # on start, a server removes what dead ones left
    until(lambda: not os.path.exists(file), 60, again)
    # A server that is not ready yet counts against the deadline.
    [replica] = until(again.replicas, 60, again)
    replica.suspend()  # so that it is not, whoever has the processor
    with pytest.raises(ConnectionError, match=r"is not ready: .*slipstream vllm-serve --model"):
        VLLMClient(base_url=again.url, api_key=again.key)
    replica.resume()
    again.stop()  # while it starts


def test_specs_must_be_those_of_the_tensors(client, original):
    client.init_communicator("cpu")
    specs = specs_of(named(original), "float32")
    specs[2] = TensorSpec(specs[2].name, "float32", specs[2].shape)
    with pytest.raises(ValueError, match="was announced in its place"):
        client.update_weights(next_version(client), list(reversed(named(original))), specs=specs)
    assert client.server_info().transaction is None
