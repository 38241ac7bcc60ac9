"""Decode steps that read a prompt once for all of its completions, on an NVIDIA GPU."""

from __future__ import annotations

import functools

import asking
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import process, steady_model
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (i * j * j) % 90 for i in range(300 + 7 * j)] for j in range(1, 9)]
STOPS = {"stop_token_ids": [7, 30, 61, 99]}


@pytest.mark.parametrize("heads", [(12, 2, 128), (9, 3, 64), (8, 8, 64), (32, 8, 128), (64, 1, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_plain_attention(heads, dtype):
    from slipstream.vllm_compat import prefix_kernel

    count, of, width = heads
    size, chunk, groups, common, programs = 16, 256, 6, 1008, 300
    members = min(8, prefix_kernel.ROWS * of // count)
    sequences = groups * members
    cache = torch.randn(sequences * 90, size, of, 2 * width, device="cuda", dtype=dtype).transpose(1, 2)
    lengths = torch.randint(common + 1, common + 400, (sequences,), device="cuda", dtype=torch.int32)
    blocks = torch.randperm(len(cache), device="cuda")[: sequences * 89].view(sequences, 89).int()
    together = torch.zeros(2, sequences, dtype=torch.int32, device="cuda")
    for first in range(0, sequences, members):
        blocks[first : first + members, : common // size] = blocks[first, : common // size].clone()
        together[0, first], together[1, first : first + members] = members, common
    queries = torch.randn(sequences, count, width, device="cuda", dtype=dtype)
    out = torch.empty_like(queries)
    partial, sums = (torch.empty(sequences, count, 7, last, device="cuda") for last in (width, 2))
    units = torch.zeros(4, prefix_kernel.HEADER + sequences * 7, dtype=torch.int32, device="cuda")
    prefix_kernel.plan(lengths, together, sequences, chunk, units, programs, of)
    prefix_kernel.attend(
        queries, cache, blocks, lengths, together, units, out,
        scale=width**-0.5, partial=partial, sums=sums, programs=programs,
    )  # fmt: skip
    for place in range(0, sequences, 3):
        length = int(lengths[place])
        rows = cache[blocks[place].long()].transpose(1, 2).reshape(-1, of, 2 * width)[:length].double()
        keys, values = rows.repeat_interleave(count // of, 1).split(width, -1)
        weights = (torch.einsum("hd,thd->ht", queries[place].double(), keys) * width**-0.5).softmax(-1)
        expected = torch.einsum("ht,thd->hd", weights, values)
        assert (out[place].double() - expected).abs().max() < (2e-3 if dtype == torch.bfloat16 else 3e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tiny.build(tmp_path_factory.mktemp("models") / "small", hidden=256, layers=4)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda()
    engine = ColocateEngine(
        model=str(path), dtype="bfloat16", max_model_len=512, max_num_seqs=64, gpu_memory_utilization=0.2,
        enable_sleep_mode=True,
    )  # fmt: skip
    try:
        engine.update_weights(0, named_tensors(model))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steady_model, "WORTH", 1)  # so small a model has nothing to gain
            yield model, engine, process.worker_of(engine._llm).model_runner.execute_model.__self__
    finally:
        engine.close()


ask = functools.partial(asking.ask, PROMPTS)


def errors(model, answers, temperature=1.0):
    """Mean distance of log-probabilities from the model's own, in float32."""
    found = []
    model = model.float()
    for place, (ids, logps, _) in enumerate(answers):
        prompt = PROMPTS[place // 8]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(ids)], device="cuda")).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids).cuda()[:, None])[:, 0]
        found.append((expected.cpu() - torch.tensor(logps)).abs())
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("ends", [STOPS, {"ignore_eos": True}], ids=["natural", "fixed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_are_as_good_as_vllms(made, monkeypatch, ends, temperature):
    model, engine, runner = made
    sampling = Sampling(96, temperature=temperature, extra=ends)
    before, shared = runner.steps_shared, runner.shared
    found = ask(engine, sampling)
    assert runner.steps_shared > before + 30  # fewer are left to read for later
    monkeypatch.setattr(runner, "shared", None)
    before = runner.steps_shared
    expected = ask(engine, sampling)
    assert shared is not None
    assert runner.steps_shared == before
    # Seeds are the same, and so are completions until rounding first decides between two tokens.
    alike = sum(a[0][:8] == b[0][:8] for a, b in zip(found, expected, strict=True))
    assert alike > 0.7 * len(found), alike
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mine, vllms = errors(model, found, temperature), errors(model, expected, temperature)
    model.bfloat16().load_state_dict(weights)
    assert mine < 1.2 * vllms + 0.005, (mine, vllms)


def test_sequences_leave_and_others_come(made):
    _, engine, runner = made
    before = runner.steps_shared
    requests = [Request(PROMPTS[0], n=8, seed=1), Request([5, 6, 7], n=5, seed=2), Request(PROMPTS[1], n=40, seed=3)]
    alone = [engine.generate([request], Sampling(64, extra=STOPS))[0] for request in requests]
    assert runner.steps_shared > before
    together = engine.generate(requests, Sampling(64, extra=STOPS))
    for mine, other in zip(together, alone, strict=True):
        alike = sum(a.ids[:6] == b.ids[:6] for a, b in zip(mine, other, strict=True))
        assert alike > 0.6 * len(mine), (alike, len(mine))


def test_sleep_and_new_weights(made):
    model, engine, runner = made
    sampling = Sampling(48, extra={"ignore_eos": True})
    first = ask(engine, sampling)
    engine.sleep(2)
    engine.wake()
    engine.update_weights(1, named_tensors(model))
    before = runner.steps_shared
    assert ask(engine, sampling) == first
    assert runner.steps_shared > before + 30
