"""Policy, reference and mixtures of both in one vLLM engine on a GPU, eager and with CUDA graphs of their pieces."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (i * j) % 90 for i in range(20 + j)] for j in range(1, 4)]
LIMIT = 1.0  # rounding of bfloat16, 0.73 on an H200; policy and reference are several nats apart


def model(path, seed):
    made = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.cuda()


@pytest.fixture(scope="module", params=["eager", "graphs"])
def engine(request, tmp_path_factory):
    path = tiny.build(tmp_path_factory.mktemp("models") / "mixed", hidden=256, layers=4)
    options = {"enforce_eager": request.param == "eager", "kv_cache_memory_bytes": 1 << 30}
    made = ColocateEngine(
        model=str(path), dtype="bfloat16", max_model_len=256, max_num_seqs=16, enable_sleep_mode=True, reference=True,
        engine_kwargs=options,
    )  # fmt: skip
    made.path = path
    yield made
    made.close()


@torch.no_grad()
def error(models, prompt, completion, share):
    ids = torch.tensor([[*prompt, *completion.ids]], device="cuda")
    policy, reference = (m(ids).logits[0, len(prompt) - 1 : -1].double() for m in models)
    logps = (share * reference + (1 - share) * policy).log_softmax(-1).cpu()
    expected = logps.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
    return (expected - torch.tensor(completion.logprobs)).abs().max().item()


def worst(engine, models, share):
    answers = engine.generate([Request(p, n=4, mixture=share) for p in PROMPTS], Sampling(24))
    return max(error(models, p, c, share) for p, group in zip(PROMPTS, answers, strict=True) for c in group)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_samples_of_every_mixture_after_updates_and_sleep(engine, level):
    models = [model(engine.path, seed) for seed in (10 * level + 1, 10 * level + 2)]
    if level:
        engine.sleep(level)
        engine.wake()
    engine.update_weights(level, named_tensors(models[0]))
    engine.update_reference(named_tensors(models[1]))
    errors = {share: worst(engine, models, share) for share in (0.0, 0.3, 0.5, 1.0, 0.0)}
    assert max(errors.values()) < LIMIT, errors
    assert worst(engine, models[::-1], 1.0) > 2 * LIMIT  # or the two would not be told apart
