"""Log-probabilities of sampled tokens recorded on the device, against those that vLLM hands on itself."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import engines
import numpy as np
import pytest

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import process, sampled_logprobs
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(4, 140)
REQUESTS = [Request(prompt, n=3, seed=10 * index) for index, prompt in enumerate(PROMPTS)]


def make(path, model, **options):
    engine = ColocateEngine(model=str(path), dtype="float32", max_model_len=256, **options)
    engine.update_weights(0, named_tensors(model))
    return engine


@pytest.fixture(scope="module")
def engine(tiny_model):
    model = engines.policy(tiny_model)
    made = make(tiny_model, model, max_num_seqs=16, reference=True)
    engines.step(model, seed=5, scale=0.05)
    made.update_reference(named_tensors(model))
    yield made
    made.close()


def assert_same(engine, requests, sampling):
    """Returns the completions, which are the same in both ways."""
    assert engine._recorder is not None
    fast = engine.generate(requests, sampling)
    recorder, engine._recorder = engine._recorder, None
    try:
        slow = engine.generate(requests, sampling)
    finally:
        engine._recorder = recorder
    for ours, theirs in zip(fast, slow, strict=True):
        assert [c.ids for c in ours] == [c.ids for c in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert len(mine.logprobs) == len(mine.ids)
            assert np.abs(np.array(mine.logprobs) - np.array(other.logprobs)).max() < 1e-5
    return fast


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24, temperature=0.7),
        Sampling(24),
        Sampling(24, temperature=1.3),
        Sampling(24, temperature=0),
        Sampling(24, temperature=0, repetition_penalty=1.5),
        Sampling(24, top_p=0.7),
        Sampling(24, top_k=3),
        Sampling(24, min_p=0.2),
        Sampling(24, temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.3),
        Sampling(24, extra={"min_tokens": 12, "stop_token_ids": list(range(5, 60))}),
        Sampling(24, extra={"stop": ["1", "a", "e"]}),
        Sampling(24, extra={"presence_penalty": 0.5, "logit_bias": {7: 5.0}}),
        Sampling(8, regex="[0-9]{3}"),
    ],
    ids=str,
)
def test_as_vllm_hands_them_on(engine, sampling):
    assert_same(engine, REQUESTS, sampling)


def test_more_sequences_than_run_at_a_time_and_prefix_hits(engine):
    answers = assert_same(engine, [Request(p, n=9, seed=3) for p in [*PROMPTS, *PROMPTS]], Sampling(12))
    for first, again in zip(answers[0], answers[4], strict=True):
        assert first.logprobs == pytest.approx(again.logprobs, abs=1e-5)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_mixtures(engine, share):
    assert_same(engine, [Request(p, n=2, seed=1, mixture=share) for p in PROMPTS], Sampling(16, temperature=0.9))


def test_steps_are_fetched_in_parts(engine, monkeypatch):
    monkeypatch.setattr(sampled_logprobs, "STEPS_ON_DEVICE", 5)
    assert_same(engine, REQUESTS, Sampling(23))


def test_finished_requests_are_told_of_while_others_run(engine):
    told = []
    requests = [Request(PROMPTS[0], n=2, seed=0), Request(PROMPTS[1], seed=0)]
    answers = engine.generate(requests, Sampling(20), lambda index, ids: told.append((index, ids)))
    assert sorted(told) == [(index, [c.ids for c in answer]) for index, answer in enumerate(answers)]


def test_a_call_that_fails_leaves_nothing_behind(engine):
    def fail(index, ids):
        raise KeyError("reward")

    requests = [Request(PROMPTS[0], seed=0), *REQUESTS]
    with pytest.raises(KeyError, match="reward"):
        engine.generate(requests, Sampling(20, extra={"stop_token_ids": list(range(5, 60))}), fail)
    assert not engine._recorder.on
    assert_same(engine, REQUESTS, Sampling(20))


def test_no_step_is_recorded_where_nobody_asks(engine):
    engine.generate(REQUESTS, Sampling(4, logprobs=False))
    assert engine._recorder._steps == []


def test_tokens_that_were_not_recorded_raise():
    recorded = sampled_logprobs.Recorded({"1_7-ab": (np.array([4, 5, 6]), np.zeros(3, np.float32))})
    assert recorded.of("7", 1, [4, 5]) == [0.0, 0.0]  # one drawn after the end
    for request, index, ids in (("7", 1, [4, 6]), ("7", 1, [4, 5, 6, 7]), ("7", 0, [4]), ("8", 1, [4])):
        with pytest.raises(RuntimeError, match="fast_logprobs=False"):
            recorded.of(request, index, ids)
    with pytest.raises(RuntimeError, match="not known"):
        sampled_logprobs.Recorded({"mine": (np.array([4]), np.zeros(1, np.float32))})


def test_unknown_runners_keep_vllms_way(engine):
    worker = process.worker_of(engine._llm)
    stranger = SimpleNamespace(model_runner=SimpleNamespace(), vllm_config=worker.vllm_config)
    with pytest.warns(RuntimeWarning, match="SimpleNamespace is not a known model runner"):
        recorder = sampled_logprobs.install(stranger)
    assert recorder is None
