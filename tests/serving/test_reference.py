"""A server with a reference model: it samples from the policy, the reference and mixtures, against transformers."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import calls
import httpx
import pytest
import servers
import torch
from integration import engines, rounds

from slipstream.generation.engine import EngineLostError, Request, Sampling
from slipstream.generation.server import ServerEngine
from slipstream.serving import wire
from slipstream.serving.client import RefusedError, ServerError, VLLMClient
from slipstream.serving.settings import Settings
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(3, 140)  # longer than one block of the prefix cache (128 tokens)
SHARES = [0.0, 0.3, 1.0]
SAMPLING = Sampling(12)
LONG = Sampling(100, extra={"ignore_eos": True})
VERSION = 3


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_API_KEY", servers.KEY)


@pytest.fixture(scope="module")
def shared(own_server):
    yield own_server
    own_server.stop()


@pytest.fixture(scope="module")
def models(tiny_model):
    """A policy and a reference that are far from one another, and from what the server loaded."""
    return [engines.step(engines.policy(tiny_model), seed, scale=0.1) for seed in (1, 2)]


@pytest.fixture
def engine(shared):
    made = connect(shared)
    yield made
    made.close()


@pytest.fixture
def both(engine, models):
    """An engine whose server has the models' weights."""
    send(engine, models)
    return engine


def connect(server):
    return ServerEngine(server.url, device=torch.device("cpu"), timeout=60, reference=True)


def send(engine, models, version=VERSION):
    engine.update_weights(version, named_tensors(models[0]))
    engine.update_reference(named_tensors(models[1]))


def requests(share, n=2):
    return [Request(prompt, n=n, seed=7, mixture=share) for prompt in PROMPTS]


def error(models, share, answers):
    """The largest difference of a completion's log-probabilities to those by transformers."""
    return max(
        engines.mixture_errors(models, prompt, completion, share).max().item()
        for prompt, completions in zip(PROMPTS, answers, strict=True)
        for completion in completions
    )


def assert_samples(engine, models, *shares):
    for share in shares:
        answers = engine.generate(requests(share), SAMPLING)
        assert error(models, share, answers) < 1e-4
        assert error(models, 1.0 if share < 0.5 else 0.0, answers) > 0.1
        assert {c.weight_version for group in answers for c in group} == {engine.version}


def test_the_option_does_not_go_with_speculative_decoding():
    assert Settings(model="m", reference=True).replica()["reference"]
    with pytest.raises(ValueError, match="speculative_config does not go with reference"):
        Settings(model="m", reference=True, speculative_config='{"method": "ngram"}')


def test_a_server_without_a_reference_says_what_to_do(server):
    assert not calls.info(server).reference
    with pytest.raises(ValueError, match="start it with `slipstream vllm-serve --reference`"):
        connect(server)
    with VLLMClient(server.url, connection_timeout=60) as client:
        with pytest.raises(RefusedError, match=r"mixture=0\.3 .* no reference model: start it with --reference") as e:
            client.sample(requests(0.3), SAMPLING)
        assert e.value.status == 400
        with pytest.raises(WeightUpdateError, match="no reference model: start it with --reference"):
            client.update_weights(0, [("model.norm.weight", torch.ones(64))], reference=True)


def test_from_the_first_weights_to_the_second(shared, engine, models):
    assert calls.info(shared).reference
    engine.update_weights(VERSION, named_tensors(models[0]))
    assert_samples(engine, models, 0.0)
    with pytest.raises(EngineLostError, match=r"mixture=0\.3: no weights of the reference have come yet; send") as e:
        engine.generate(requests(0.3), SAMPLING)
    assert e.value.__cause__.status == 409
    engine.update_reference(named_tensors(models[1]))
    assert_samples(engine, models, *SHARES)
    others = list(models)
    for index, seed in ((0, 5), (1, 6)):
        others[index] = engines.step(copy_of(models[index]), seed, scale=0.1)
        send_one = (functools.partial(engine.update_weights, VERSION + 1), engine.update_reference)[index]
        send_one(named_tensors(others[index]))
        assert engine.version == calls.info(shared).version == VERSION + 1
        assert_samples(engine, others, *SHARES)


def copy_of(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_refused_reference_leaves_the_old_one(both, models):
    sent = [(name, tensor.clone()) for name, tensor in named_tensors(models[0])]
    with pytest.raises(WeightUpdateError, match=r"the engine is unchanged: missing: model\.norm\.weight"):
        both._client.update_weights(0, [pair for pair in sent if pair[0] != "model.norm.weight"], reference=True)
    sent[2][1].view(-1)[5] = torch.nan
    with pytest.raises(WeightUpdateError, match="not finite"):
        both.update_reference(sent)
    assert_samples(both, models, *SHARES)


def test_calls_of_different_mixtures_at_the_same_time(shared, both, models):
    shares = [*SHARES, 0.5, 0.0, 0.3, 1.0, 0.0]
    with ThreadPoolExecutor(len(shares) + 1) as pool:
        answers = pool.map(lambda share: both.generate(requests(share), LONG), shares)
        model = calls.CLIENT.get(f"{shared.url}/v1/models", headers=shared.headers).json()["data"][0]["id"]
        asked = {"model": model, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
        asked |= {"return_token_ids": True, "ignore_eos": True}
        plain = pool.submit(
            calls.CLIENT.post, f"{shared.url}/v1/completions", json=asked, headers=shared.headers
        ).result()
        for share, answer in zip(shares, answers, strict=True):
            assert error(models, share, answer) < 1e-4
            assert {len(c.ids) for group in answer for c in group} == {100}
    # OpenAI clients get the policy.
    assert plain.json()["choices"][0]["token_ids"] == engines.greedy(models[0], PROMPTS[0], 24)


def test_clients_of_the_openai_routes_cannot_name_what_a_mixture_has_cached(shared, both, models):
    """A block computed by the policy alone has no keys and values of the reference."""
    model = calls.CLIENT.get(f"{shared.url}/v1/models", headers=shared.headers).json()["data"][0]["id"]
    for salt in ("mixture", "reference"):
        asked = {"model": model, "prompt": PROMPTS[0], "max_tokens": 1, "cache_salt": salt}
        answer = calls.CLIENT.post(f"{shared.url}/v1/completions", json=asked, headers=shared.headers)
        assert answer.status_code == 200
    assert_samples(both, models, *SHARES)


def test_a_call_has_one_mixture(shared, both):
    for share, reason in ((0.3, r"mixtures 0\.0, 0\.3; .* make a call for each"), (1.5, r"prompts\[3\]\.mixture=1\.5")):
        with pytest.raises(RefusedError, match=reason) as e:
            both._client.sample([*requests(0.0), *requests(share)], SAMPLING)
        assert e.value.status == 400


def test_an_update_in_flight(shared, both, models):
    """A mixture goes on with the new policy; each token says which."""
    new = engines.step(copy_of(models[0]), 8, scale=0.1)
    mixed = [Request(prompt, n=24, seed=11, mixture=0.3) for prompt in PROMPTS]
    switched = 0
    for _ in range(5):  # all may end before the update is there, where others have the processor
        both.update_weights(VERSION, named_tensors(models[0]))
        stream = both._client.stream(mixed, Sampling(110))
        found = [next(stream)]
        both.update_weights(VERSION + 4, named_tensors(new))
        found += list(stream)
        for index, _, completion in found:
            runs = completion.version_runs or ((0, completion.weight_version),)
            ends = [first for first, _ in runs[1:]] + [len(completion.ids)]
            switched += len(runs) > 1
            for (first, version), end in zip(runs, ends, strict=True):
                pair = [new if version == VERSION + 4 else models[0], models[1]]
                errors = engines.mixture_errors(pair, PROMPTS[index], completion, 0.3)[first:end]
                assert errors.max() < 1e-4
        assert found[0][2].weight_version == VERSION
        if switched:
            break
    assert switched > 0


def test_who_leaves_while_waiting_holds_up_nobody(shared, both):
    waiting = wire.GenerateMessage(
        prompts=[wire.PromptMessage(ids=wire.pack_ids(PROMPTS[0]), mixture=1.0)],
        sampling=wire.SamplingMessage(max_tokens=4),
    )
    long, short = (
        wire.encode(calls.request(PROMPTS[:1], n=n, max_tokens=tokens, extra=calls.LONG))
        for n, tokens in ((2000, 110), (1, 1))
    )
    post = functools.partial(
        calls.CLIENT.stream, "POST", f"{shared.url}/generate",
        headers={**shared.headers, "content-type": wire.MSGPACK},
    )  # fmt: skip
    with post(content=long) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.ReadTimeout), post(content=wire.encode(waiting), timeout=httpx.Timeout(60, read=0.5)):
            pass
        with post(content=short) as answer:  # which begins when it is let in
            assert answer.status_code == 200
            assert calls.info(shared).replicas[0].running > 2  # the long ones have not all ended
    servers.until(lambda: calls.info(shared).replicas[0].running == 0, 60, shared)


@pytest.mark.parametrize(("name", "share"), [("NashMD", 0.5), ("XPO", 1.0)])
def test_trainers_compare_the_policy_with_it(shared, tiny_model, tmp_path, name, share):
    trainer = rounds.make(
        name, tiny_model, tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=shared.url,
        vllm_max_model_length=128, eval_temperature=0.0,
    )  # fmt: skip
    try:
        trainer.train()
        rollouts, _ = trainer._collect(trainer.train_dataset, [(i, 0, 2) for i in range(4)], ("seed",), 2, 8)
        assert (calls.info(shared).version, trainer.engine.version) == (2, 2)
        trainer.model.eval()
        pair = [trainer.model, engines.policy(tiny_model)]
        for rollout, mixture in zip(rollouts, [0.0, share] * 4, strict=True):
            ids = rollout.completion.ids
            assert ids == engines.mixed(pair, rollout.prompt.ids, ids, mixture).argmax(-1).tolist()
        assert any(a.completion.ids != b.completion.ids for a, b in zip(rollouts[::2], rollouts[1::2], strict=True))
    finally:
        trainer.close()


def restart(server):
    killed = server.replica(0)
    killed.kill()
    servers.until(lambda: any(replica != killed for replica in server.replicas()), 60, server)
    servers.until(lambda: calls.info(server).replicas[0].state in ("ready", "stale"), servers.START_SECONDS, server)
    return calls.info(server).replicas[0]


def test_a_replica_that_is_started_again_has_both(shared, both, models):
    assert restart(shared).state == "ready"
    assert_samples(both, models, *SHARES)


def test_a_replica_that_cannot_have_the_reference_again_asks_for_it(shared, both, models):
    # What has begun has overwritten the reference in shared memory.
    begin = wire.BeginMessage(version=0, tensors=calls.specs_of(list(named_tensors(models[1]))), reference=True)
    reply = calls.call(shared, "POST", "/weights/begin", begin, wire.BeginReply)
    assert calls.abort(shared, reply.transaction) == {"aborted": True}
    replica = restart(shared)
    assert (replica.state, replica.version) == ("stale", VERSION)
    with pytest.raises(EngineLostError, match="it has not got version 0 of the reference's weights") as e:
        both.generate(requests(0.3), SAMPLING)
    assert isinstance(e.value.__cause__, ServerError)
    both.recover()
    send(both, models)
    assert_samples(both, models, *SHARES)
