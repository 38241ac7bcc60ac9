"""Steps that only decode, scheduled for all sequences at once: the same completions as vLLM's own scheduling gives."""

from __future__ import annotations

from importlib.util import find_spec

import engines
import pytest

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import load, process, steady, steady_batch
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [prompt[: 20 + 9 * i] for i, prompt in enumerate(engines.prompts(8, 90))]
ENDS = [7, 30, 61, 99]
SHORT = Sampling(70, extra={"stop_token_ids": ENDS})
CASES = {
    "natural lengths": SHORT,
    "fixed lengths": Sampling(70, extra={"ignore_eos": True}),
    "least lengths": Sampling(70, extra={"stop_token_ids": ENDS, "min_tokens": 25}),
    "greedy": Sampling(70, temperature=0.0, extra={"stop_token_ids": ENDS}),
    "without log-probabilities": Sampling(40, logprobs=False, extra={"stop_token_ids": ENDS}),
    "one token": Sampling(1),
    "until a text": Sampling(40, extra={"stop": ["a", "7"]}),
}


def ask(engine, sampling, n=5, prompts=PROMPTS):
    requests = [Request(prompt, n=n, seed=100 * i) for i, prompt in enumerate(prompts)]
    return [[(c.ids, c.logprobs, c.finish_reason) for c in group] for group in engine.generate(requests, sampling)]


# 48 blocks are too few for 16 sequences of up to 160 tokens: some are put aside and come back.
SHORT_OF_MEMORY = {"engine_kwargs": {"block_size": 32, "num_gpu_blocks_override": 48}}
ENGINES = {
    "roomy": {"engine_kwargs": {"block_size": 32}},
    "short of memory": SHORT_OF_MEMORY,
    "log-probabilities from vLLM": SHORT_OF_MEMORY | {"fast_logprobs": False},
}


@pytest.fixture(scope="module", params=ENGINES.values(), ids=ENGINES)
def both(request, tiny_model):
    """What vLLM's own scheduling gives in each case; and the same engine, from now on with steady steps."""
    model = engines.policy(tiny_model)
    engine = ColocateEngine(
        model=str(tiny_model), dtype="float32", max_model_len=192, max_num_seqs=16, steady_decode=False,
        **request.param,
    )  # fmt: skip
    engine.update_weights(0, named_tensors(model))
    expected = {name: ask(engine, sampling) for name, sampling in CASES.items()}
    process.decode_steadily(engine._llm)
    yield engine, expected
    engine.close()


@pytest.fixture
def steps(monkeypatch):
    """How many steps were scheduled for all sequences at once, in a list."""
    counted, schedule = [], steady_batch.Batch.schedule

    def counting(batch):
        output = schedule(batch)
        if output is not None:
            counted.append(len(output.num_scheduled_tokens))
        return output

    monkeypatch.setattr(steady_batch.Batch, "schedule", counting)
    return counted


@pytest.mark.parametrize("name", CASES)
def test_the_same_completions(both, steps, name):
    engine, expected = both
    assert ask(engine, CASES[name]) == expected[name]
    assert ask(engine, CASES[name]) == expected[name]  # with the prompts' blocks in the prefix cache
    # Where every text has to be looked at, or there is nothing to decode, vLLM does it all.
    if name in ("one token", "until a text"):
        assert not steps
    else:
        assert len(steps) > 30
        assert max(steps) == (8 if name == "greedy" else 16)  # one greedy completion stands for all of a prompt


def test_completions_are_told_of_while_others_are_sampled(both):
    engine, expected = both
    told = {}
    requests = [Request(prompt, n=5, seed=100 * i) for i, prompt in enumerate(PROMPTS)]
    engine.generate(requests, SHORT, on_finished=lambda index, ids: told.setdefault(index, ids))
    assert told == {i: [ids for ids, _, _ in group] for i, group in enumerate(expected["natural lengths"])}


def test_a_call_that_was_broken_off_leaves_nothing(both):
    engine, expected = both

    def stop(index, ids):
        raise KeyboardInterrupt

    requests = [Request(prompt, n=5, seed=1) for prompt in PROMPTS]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, SHORT, on_finished=stop)
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    assert not scheduler.requests
    assert not scheduler.update_from_output.__self__.unsent
    assert ask(engine, SHORT) == expected["natural lengths"]
    # Every block is free again but for vLLM's own.
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_what_vllm_keeps_of_a_sequence_is_as_it_would_be(both, monkeypatch):
    """Given back in the middle, a sequence goes on as if nothing had happened."""
    engine, expected = both
    schedule, calls = steady_batch.Batch.schedule, []

    def sometimes(batch):
        calls.append(1)
        return None if len(calls) % 3 == 0 else schedule(batch)

    monkeypatch.setattr(steady_batch.Batch, "schedule", sometimes)
    for name in ("natural lengths", "least lengths", "fixed lengths"):
        assert ask(engine, CASES[name]) == expected[name]
    assert len(calls) > 100


def test_an_unknown_version_or_way_of_scheduling_is_left_alone(both, monkeypatch):
    engine, _ = both
    core = engine._llm.llm_engine.engine_core.engine_core
    before = core.scheduler.schedule
    with monkeypatch.context() as patch:
        patch.setenv("SLIPSTREAM_STEADY_DECODE", "0")
        assert steady.install(core, "0.32.0") == "SLIPSTREAM_STEADY_DECODE=0 says so"
    with monkeypatch.context() as patch:
        patch.setattr(core.scheduler.scheduler_config, "prefill_schedule_interval", 2)
        assert "prefill_schedule_interval" in steady.install(core, load().__version__)
    assert steady.install(core, "0.34.0") == "vLLM 0.34.0 was not tried"
    assert core.scheduler.schedule == before
