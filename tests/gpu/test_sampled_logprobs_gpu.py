"""Log-probabilities recorded on an NVIDIA GPU against the model's own, with asynchronous scheduling as vLLM chooses."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (i * j) % 90 for i in range(20 + j)] for j in range(1, 7)]
LIMIT = 1.0  # rounding of bfloat16 with random weights


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def pair(request, tmp_path_factory):
    path = tiny.build(tmp_path_factory.mktemp("models") / "recorded", hidden=256, layers=4)
    dtype = getattr(torch, request.param)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()
    engine = ColocateEngine(
        model=str(path), dtype=request.param, max_model_len=256, max_num_seqs=16,
        engine_kwargs={"kv_cache_memory_bytes": 1 << 28},
    )  # fmt: skip
    engine.update_weights(0, named_tensors(model))
    yield engine, model
    engine.close()


@torch.no_grad()
def expected(model, prompt, ids, temperature):
    logits = model(torch.tensor([[*prompt, *ids]], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
    logps = (logits / (temperature or 1.0)).log_softmax(-1).cpu()
    return logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("extra", [{}, {"stop": ["1", "a"]}, {"min_tokens": 20}], ids=str)
def test_as_the_model_has_them(pair, temperature, extra):
    engine, model = pair
    assert engine._recorder is not None
    answers = engine.generate([Request(p, n=6, seed=1) for p in PROMPTS], Sampling(48, temperature, extra=extra))
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        for completion in completions:
            assert len(completion.logprobs) == len(completion.ids)
            if extra.get("min_tokens") is None:  # which takes the end's token out of the first distributions
                wanted = expected(model, prompt, completion.ids, temperature)
                assert (wanted - torch.tensor(completion.logprobs)).abs().max() < LIMIT


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.8}, {"repetition_penalty": 1.3}], ids=str)
def test_as_vllm_hands_them_on(pair, options):
    engine, _ = pair
    requests, recorder = [Request(p, n=2, seed=1) for p in PROMPTS[:2]], engine._recorder
    fast = engine.generate(requests, Sampling(16, **options))
    engine._recorder = None
    try:
        slow = engine.generate(requests, Sampling(16, **options))
    finally:
        engine._recorder = recorder
    for ours, theirs in zip(fast, slow, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.ids[0] == other.ids[0]
            same = next((i for i, (a, b) in enumerate(zip(mine.ids, other.ids, strict=False)) if a != b), len(mine.ids))
            assert mine.logprobs[:same] == pytest.approx(other.logprobs[:same], abs=LIMIT)
