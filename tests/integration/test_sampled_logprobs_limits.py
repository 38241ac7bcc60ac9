"""Log-probabilities of sampled tokens where requests lose their place in the cache, or are read in parts."""

from __future__ import annotations

from importlib.util import find_spec

import engines
import pytest
import torch

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def check(path, length, tokens, *, seed, **options):
    model = engines.policy(path)
    engine = ColocateEngine(model=str(path), dtype="float32", max_model_len=512, **options)
    try:
        assert engine._recorder is not None
        engine.update_weights(0, named_tensors(model))
        prompts = engines.prompts(6, length)
        preempted = count_preemptions(engine)
        answers = engine.generate([Request(p, n=2, seed=seed) for p in prompts], Sampling(tokens))
    finally:
        engine.close()
    for prompt, completions in zip(prompts, answers, strict=True):
        for completion in completions:
            expected = engines.logprobs(model, prompt, completion.ids)
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4
    return preempted


def count_preemptions(engine):
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []

    def counted(request, *args, **options):
        preempted.append(request.request_id)
        return preempt(request, *args, **options)

    scheduler._preempt_request = counted
    return preempted


def test_preempted_requests(tiny_model):
    block = 128 * 2 * block_width(tiny_model)
    options = {"kv_cache_memory_bytes": 9 * block, "enable_prefix_caching": False}
    assert check(tiny_model, 120, 200, seed=1, max_num_seqs=8, engine_kwargs=options)


def block_width(path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    heads = config.num_key_value_heads
    return config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 4


def test_prompts_read_in_parts(tiny_model):
    # Unseeded: vLLM cannot take a draw back from a generator of its own on CPU.
    options = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    check(tiny_model, 200, 16, seed=None, max_num_seqs=4, engine_kwargs=options)
