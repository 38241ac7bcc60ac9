"""One replica process on CPU, spoken to over its socket, against transformers on the same weights."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import msgspec
import pytest
import torch
from integration import engines
from replica_client import ReplicaProcess, prompt, until
from stores import KEY, store_server

from slipstream.serving import wire
from slipstream.weights.buckets import specs_of
from slipstream.weights.export import named_tensors
from slipstream.weights.transports import group

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(4, 140)  # longer than one block of the prefix cache (128 tokens)
TOKENS = 24
EOS = (1,)
LONG = {"max_tokens": 100, "extra": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def replica(tiny_model, tmp_path_factory):
    started = ReplicaProcess(tiny_model, tmp_path_factory.mktemp("replica"), served_model_name="tiny")
    yield started
    if started.process.poll() is None:
        started.stop()


@pytest.fixture
def model(tiny_model):
    return engines.policy(tiny_model)


def push(replica, version, model, **options):
    return replica.push(version, named_tensors(model), **options)


def assert_serves(replica, model, version):
    """The replica computes with the weights of `model`, says so, and uses nothing that it cached before."""
    answers = replica.generate(*(prompt(p) for p in PROMPTS), version=version, max_tokens=TOKENS, temperature=0)
    for ids, [completion] in zip(PROMPTS, answers, strict=True):
        assert completion.ids == engines.greedy(model, ids, TOKENS, EOS)
        assert max_difference(model, ids, completion) < 1e-4
        assert completion.weight_version == version
    assert replica.info().version == version


def max_difference(model, ids, completion, first=0):
    """Largest distance of a completion's log-probabilities from the model's, from token `first` on."""
    difference = engines.logprobs(model, ids, completion.ids) - torch.tensor(completion.logprobs)
    return difference[first:].abs().max()


def test_it_serves_the_checkpoint_and_says_what_it_is(replica, model):
    assert_serves(replica, model, 0)
    info = replica.info()
    assert (info.state, info.ranks, info.dtype, info.max_model_len) == ("ready", 1, "float32", 256)
    assert (info.platform, info.devices, info.running) == ("cpu", [], 0)


def test_a_completion_depends_on_its_own_seed_alone(replica):
    [four] = replica.generate(prompt(PROMPTS[0], n=4, seed=11), max_tokens=TOKENS)
    parts = [prompt(PROMPTS[0], n=n, seed=seed) for n, seed in ((2, 11), (2, 13), (1, 12))]
    [two, more, one] = replica.generate(*parts, max_tokens=TOKENS)
    assert [c.ids for c in four] == [c.ids for c in [*two, *more]]
    assert one[0].ids == four[1].ids
    assert len({tuple(c.ids) for c in four}) == 4


def test_greedy_completions_are_sampled_once(replica):
    [three] = replica.generate(prompt(PROMPTS[0], n=3), max_tokens=TOKENS, temperature=0)
    assert three[0] == three[1] == three[2]


def test_finish_reasons_and_missing_logprobs(replica):
    [[short, _]] = replica.generate(prompt(PROMPTS[0], n=2, seed=1), max_tokens=3, logprobs=False)
    assert short.logprobs is None
    assert (len(short.ids), short.finish_reason) == (3, "length")
    stop = short.ids[1]
    [[ended]] = replica.generate(prompt(PROMPTS[0], seed=1), max_tokens=3, extra={"stop_token_ids": [stop]})
    assert (ended.ids, ended.finish_reason) == (short.ids[:2], "stop")


def test_text_and_messages_are_rendered_and_told(replica, tiny_model):
    import tiny

    message = wire.GenerateMessage(
        prompts=[
            wire.PromptMessage(text="1+1=", seed=0),
            wire.PromptMessage(messages=[{"role": "user", "content": "hi"}], n=2, seed=0),
        ],
        sampling=wire.SamplingMessage(max_tokens=2),
    )
    with replica.streaming(message) as frames:
        told = {f.prompt: f.ids for f in frames if isinstance(f, wire.PromptFrame)}
    made = tiny.tokenizer()
    assert told == {0: made("1+1=")["input_ids"], 1: made("<user>hi<end><assistant>")["input_ids"]}


def test_completions_stream_as_they_finish(replica):
    prompts = [prompt(PROMPTS[0], seed=1), prompt(PROMPTS[1], seed=2)]
    stops = replica.generate(prompts[1], **LONG)[0][0].ids[0]
    sampling = wire.SamplingMessage(max_tokens=100, extra={"ignore_eos": True, "stop_token_ids": [stops]})
    message = wire.GenerateMessage(prompts=prompts[1:] + prompts[:1] * 400, sampling=sampling)
    with replica.streaming(message) as frames:
        first = next(frames)
        running = replica.info().running  # of seconds of work
    until(lambda: replica.info().running == 0, 60)
    assert first.prompt == 0
    assert len(first.completion.ids) == 1
    assert running > 0


@pytest.mark.parametrize(
    ("status", "reason", "prompts", "options"),
    [
        (400, "prompt 1 is empty", [prompt([5]), prompt([])], {}),
        (400, "max_model_len=256", [prompt([5] * 250)], {}),
        (400, "token id 128", [prompt([128])], {}),
        (400, "token id -1", [prompt([-1])], {}),
        (400, "no option 'top_q'. Did you mean", [prompt([5])], {"extra": {"top_q": 1}}),
        (400, "stop_token_ids", [prompt([5])], {"extra": {"stop_token_ids": "five"}}),
        (400, "RepetitionDetection", [prompt([5])], {"extra": {"repetition_detection": {"min_count": 2}}}),
        (400, "field of its own", [prompt([5])], {"extra": {"seed": 1}}),
        (400, "temperature", [prompt([5])], {"temperature": float("nan")}),
        (400, "top_p", [prompt([5])], {"top_p": 2.0}),
        (400, "max_tokens", [prompt([5])], {"max_tokens": 0}),
        (400, "prompt 0: n=0", [prompt([5], n=0)], {}),
        (400, "prompt 0: seed", [prompt([5], seed=2**63 - 1)], {}),
        (400, "no reference model", [prompt([5], mixture=0.5)], {}),
        (400, "0 of ids, text and messages", [wire.PromptMessage()], {}),
        (400, "no multiple of 4", [wire.PromptMessage(ids=b"abc")], {}),
        (400, "prompt 0", [wire.PromptMessage(messages=[{"content": "who?"}])], {}),
        (400, "regex", [prompt([5])], {"regex": "("}),
        (409, "version 7 of the weights is asked for, but version", [prompt([5])], {"version": 7}),
    ],
)
def test_wrong_requests_are_told_why(replica, status, reason, prompts, options):
    version = options.pop("version", None)
    message = wire.GenerateMessage(prompts=prompts, sampling=wire.SamplingMessage(**options), version=version)
    answer = replica.post("/generate", message)
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    assert replica.info().running == 0


def test_bodies_that_are_no_messages_are_told_why(replica):
    for path in ("/generate", "/weights/begin", "/weights/commit", "/weights/abort", "/communicator"):
        assert replica.client.post(path, content=b"\xc1").status_code == 400
    answer = replica.client.post("/generate", json={"prompts": [], "sampling": {"top_q": 1}})
    assert answer.status_code == 400
    assert "top_q" in answer.json()["detail"]


def test_updates_change_what_serves(replica, model):
    for version in (1, 2):
        engines.step(model, seed=version)
        answer = push(replica, version, model)
        reply = msgspec.msgpack.decode(answer.content, type=wire.CommitReply)
        assert reply.version == version
        assert 0 < reply.paused_seconds < 60
        assert_serves(replica, model, version)


def test_updates_that_do_not_fit_are_refused_before_a_byte_moves(replica, model):
    push(replica, 3, model)
    specs = specs_of(named_tensors(model), "float32")
    named = {spec.name: spec for spec in specs}
    wrong = {
        "missing: model.norm.weight": [s for s in specs if s.name != "model.norm.weight"],
        "sent twice: model.norm.weight": [*specs, named["model.norm.weight"]],
        "incomplete (a part of a fused module was not sent)": [
            s for s in specs if "layers.0.self_attn.q_proj" not in s.name
        ],
        "(65,)": [wire.TensorSpec(s.name, s.dtype, (65,)) if s.name == "model.norm.weight" else s for s in specs],
        "'model.nobody'": [*specs, wire.TensorSpec("model.nobody", "float32", (64,))],
    }
    for reason, given in wrong.items():
        transaction, answer = replica.begin(4, given)
        assert answer.status_code == 400
        detail = answer.json()["detail"]
        assert "refused, the engine is unchanged" in detail
        assert reason in detail
        commit = replica.post("/weights/commit", wire.CommitMessage(transaction=transaction, checksums=[]))
        assert commit.status_code == 409
    for options, reason in (({"mode": "drop"}, "mode='drop'"), ({"transport": "pigeon"}, "transport='pigeon'")):
        answer = replica.begin(4, specs, **options)[1]
        assert (answer.status_code, reason in answer.json()["detail"]) == (400, True)
    assert_serves(replica, model, 3)


def test_updates_that_arrive_changed_are_refused(replica, model, tiny_model):
    push(replica, 3, model)
    other = engines.step(engines.policy(tiny_model), seed=9)
    names = [name for name, _ in named_tensors(other)]
    answer = push(replica, 4, other, spoil=lambda sums: [*sums[:-1], sums[-1] + 1])
    assert answer.status_code == 400
    assert f"(checksum): {names[-1]}" in answer.json()["detail"]
    answer = push(replica, 4, other, spoil=lambda sums: sums[:-1])
    assert answer.status_code == 400
    assert f"{len(names) - 1} checksums came, and {len(names)} are needed" in answer.json()["detail"]
    with torch.no_grad():
        other.model.norm.weight[3] = float("nan")
    answer = push(replica, 4, other)
    assert answer.status_code == 400
    assert "not finite (NaN or infinity) in model.norm.weight" in answer.json()["detail"]
    assert_serves(replica, model, 3)


def test_an_aborted_update_is_over(replica, model):
    push(replica, 3, model)
    transaction, _ = replica.begin(4, specs_of(named_tensors(model), "float32"))
    message = wire.AbortMessage(transaction=transaction)
    for _ in range(2):
        assert replica.post("/weights/abort", message).status_code == 200
    commit = replica.post("/weights/commit", wire.CommitMessage(transaction=transaction, checksums=[]))
    assert (commit.status_code, "is not open" in commit.json()["detail"]) == (409, True)
    assert_serves(replica, model, 3)


def test_an_update_in_flight_says_which_tokens_are_whose(replica, model, tiny_model):
    new = engines.step(engines.policy(tiny_model), seed=5, scale=0.05)
    for _ in range(5):  # on a busy machine all may be over before the push begins: that shows nothing
        push(replica, 5, model)
        with Beside(lambda: replica.generate(*(prompt(p, n=16, seed=7) for p in PROMPTS), **LONG)) as beside:
            until(lambda: replica.info().running or beside.done, 60)
            reply = msgspec.msgpack.decode(push(replica, 6, new).content, type=wire.CommitReply)
        assert reply.version == 6
        switched = 0
        for ids, answers in zip(PROMPTS, beside.result, strict=True):
            for completion in answers:
                assert len(completion.ids) == 100
                runs = completion.version_runs or ((0, completion.weight_version),)
                last = {5: model, 6: new}[runs[-1][1]]
                assert max_difference(last, ids, completion, first=runs[-1][0]) < 1e-4
                if len(runs) == 2:
                    switched += 1
                    assert [version for _, version in runs] == [5, 6]
                    first = runs[1][0]
                    old = engines.logprobs(model, ids, completion.ids) - torch.tensor(completion.logprobs)
                    assert old[:first].abs().max() < 1e-4
                    assert first > 90 or old[first:].abs().max() > 1e-2  # a few tokens may be as likely by chance
        if switched >= 8:
            break
    assert switched >= 8
    assert_serves(replica, new, 6)


def test_an_update_that_waits_lets_requests_end(replica, model, tiny_model):
    push(replica, 7, model)
    new = engines.step(engines.policy(tiny_model), seed=5, scale=0.05)
    with Beside(lambda: replica.generate(*(prompt(p, n=16, seed=7) for p in PROMPTS), **LONG)) as beside:
        until(lambda: replica.info().running or beside.done, 60)
        reply = msgspec.msgpack.decode(push(replica, 8, new, mode="wait").content, type=wire.CommitReply)
    assert reply.version == 8
    versions = set()
    for ids, answers in zip(PROMPTS, beside.result, strict=True):
        for completion in answers:
            assert completion.version_runs == ()
            assert max_difference({7: model, 8: new}[completion.weight_version], ids, completion) < 1e-4
            versions.add(completion.weight_version)
    assert 7 in versions  # those that had no place among the 16 yet come after the update
    assert_serves(replica, new, 8)


@pytest.fixture
def trainers_group(replica):
    """Makes a process group of this process, rank 0, and the replica's worker."""
    with store_server() as (url, _), ThreadPoolExecutor() as pool:
        made, numbers = [], itertools.count()

        def join(timeout):
            name = f"group-{next(numbers)}/"
            message = wire.ReplicaCommunicator(
                backend="gloo", first_rank=1, world_size=2, group=name, store_url=url, api_key=KEY, timeout=timeout
            )
            assert replica.post("/communicator", message).status_code == 200
            store = group.HttpStore(url, KEY, name, timeout)
            return pool.submit(group.join, "gloo", store, 0, 2, timeout, "cpu").result(60)

        def make(timeout=30.0):
            for _ in range(5):  # on a busy machine they may miss each other, if the timeout is short
                with contextlib.suppress(group.GroupError):
                    made.append(join(timeout))
                    return made[-1]
            pytest.fail("the group's members have missed each other five times")

        yield make
        assert replica.post("/communicator", method="DELETE").status_code == 200
        for one in made:
            group.leave(one)


def test_updates_come_through_a_process_group(replica, model, trainers_group):
    ours = trainers_group()
    for version in (9, 10):
        tensors = list(named_tensors(engines.step(model, seed=version)))
        specs = specs_of(tensors, "float32")
        transaction, answer = replica.begin(version, specs, transport="group")
        assert answer.status_code == 200, answer.text
        commit = wire.CommitMessage(transaction=transaction, checksums=group.send(ours, specs, tensors))
        assert replica.post("/weights/commit", commit).status_code == 200
        assert_serves(replica, model, version)
    transaction, _ = replica.begin(11, specs, transport="group")
    wrong = [group.send(ours, specs, tensors)[0] ^ 1]
    refused = replica.post("/weights/commit", wire.CommitMessage(transaction=transaction, checksums=wrong))
    assert (refused.status_code, tensors[0][0] in refused.json()["detail"]) == (400, True), refused.text
    spoiled = [(name, tensor.clone()) for name, tensor in tensors]
    spoiled[4][1].view(-1)[-1] = float("nan")
    transaction, _ = replica.begin(11, specs, transport="group")
    commit = wire.CommitMessage(transaction=transaction, checksums=group.send(ours, specs, spoiled))
    refused = replica.post("/weights/commit", commit)
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith("weight update refused, the engine is unchanged: values that are not")
    assert spoiled[4][0] in refused.json()["detail"]
    assert_serves(replica, model, 10)


def test_a_trainer_that_does_not_send_leaves_the_old_weights(replica, model, trainers_group):
    push(replica, 9, model)
    tensors = list(named_tensors(model))
    specs = specs_of(tensors, "float32")
    trainers_group(timeout=2.0)
    transaction, _ = replica.begin(11, specs, transport="group")
    answer = replica.post("/weights/commit", wire.CommitMessage(transaction=transaction, checksums=[0] * len(specs)))
    assert (answer.status_code, "waited for the trainer" in answer.json()["detail"]) == (400, True), answer.text
    answer = replica.begin(11, specs, transport="group")[1]
    assert (answer.status_code, "there is no process group" in answer.json()["detail"]) == (400, True)
    ours = trainers_group(timeout=120.0)
    aborted, _ = replica.begin(11, specs, transport="group")
    began = time.monotonic()
    assert replica.post("/weights/abort", wire.AbortMessage(transaction=aborted)).status_code == 200
    assert time.monotonic() - began < 20  # the worker does not generate meanwhile
    with pytest.raises(group.GroupError):
        [group.send(ours, specs, tensors) for _ in range(10)]  # the first may still fit into buffers
    assert_serves(replica, model, 9)
    ours = trainers_group()
    transaction, _ = replica.begin(12, specs, transport="group")
    commit = wire.CommitMessage(transaction=transaction, checksums=group.send(ours, specs, tensors))
    assert replica.post("/weights/commit", commit).status_code == 200
    assert_serves(replica, model, 12)


def test_a_client_that_goes_away_takes_its_requests_along(replica):
    # More than a minute of work.
    message = wire.GenerateMessage(prompts=[prompt(p, n=1000) for p in PROMPTS], sampling=wire.SamplingMessage(**LONG))
    with replica.streaming(message):
        until(lambda: replica.info().running > 0, 60)
    until(lambda: replica.info().running == 0, 30)


def test_openai_clients_are_served(replica):
    listed = replica.client.get("/v1/models").json()
    assert [found["id"] for found in listed["data"]] == ["tiny"]
    said = [{"role": "user", "content": "1+1="}]
    chat = {"model": "tiny", "messages": said, "max_tokens": 4, "temperature": 0, "logprobs": True}
    choice = replica.client.post("/v1/chat/completions", json=chat).json()["choices"][0]
    assert choice["message"]["role"] == "assistant"
    [[ours]] = replica.generate(wire.PromptMessage(messages=said), max_tokens=4, temperature=0)
    theirs = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert theirs == pytest.approx(list(ours.logprobs), abs=1e-4)
    plain = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "n": 2, "seed": 3}
    answer = replica.client.post("/v1/completions", json=plain).json()
    assert [len(c["text"]) > 0 for c in answer["choices"]] == [True, True]
    lines = [
        line.removeprefix("data: ")
        for line in replica.client.post("/v1/completions", json=plain | {"n": 1, "stream": True}).text.splitlines()
        if line
    ]
    assert lines[-1] == "[DONE]"
    assert all("choices" in json.loads(line) for line in lines[:-1])
    assert replica.client.post("/v1/completions", json=plain | {"model": "who"}).status_code == 404
    assert replica.client.post("/v1/completions", json=plain | {"max_tokens": 1000}).status_code == 400
    assert replica.client.get("/collective_rpc").status_code == 404


def test_the_prefix_cache_can_be_emptied(replica):
    assert replica.post("/reset_prefix_cache").status_code == 200


def test_sigterm_ends_it_while_it_generates(replica):
    # More than a minute of work.
    message = wire.GenerateMessage(prompts=[prompt(p, n=2000) for p in PROMPTS], sampling=wire.SamplingMessage(**LONG))
    with replica.streaming(message) as frames:
        next(frames)
        replica.process.send_signal(signal.SIGTERM)
        replica.process.wait(60)
        with pytest.raises(Exception, match=r"cut off|incomplete|peer closed|engine"):
            list(frames)


class Beside:
    """Runs a function in a thread while the `with` block runs; `result` is what it returned."""

    def __init__(self, function):
        self.result, self._error = None, None

        def run():
            try:
                self.result = function()
            except BaseException as error:  # noqa: BLE001
                self._error = error

        self._thread = threading.Thread(target=run)

    @property
    def done(self):
        return not self._thread.is_alive()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self._thread.join(120)
        if error is None:
            assert self.done
            if self._error is not None:
                raise self._error
