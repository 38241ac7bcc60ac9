"""Packed rows, shared prompts and chunked logits on an NVIDIA GPU, against plain rows in float32."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from slipstream.modeling import attention, heads
from slipstream.modeling.attention import packed_attention
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packable import obstacle
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, Prompt, Rollout, StepTotals

pytestmark = pytest.mark.gpu

GROUPS = [(70, [90, 3, 140, 33]), (9, [65]), (130, [1, 200, 128])]
SHAPE = {
    "vocab_size": 5000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS = {
    "Llama": SHAPE,
    "Qwen3": SHAPE | {"head_dim": 128},
    "Mistral": SHAPE | {"sliding_window": 48},
    "Gemma3": SHAPE | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 48, "num_hidden_layers": 7},
    "Mixtral": SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(name):
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**MODELS[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.06)
    return model.cuda()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return build(request.param)


@pytest.fixture
def rollouts():
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, (p, completions) in enumerate(GROUPS):
        prompt = Prompt(torch.randint(5000, (p,), generator=generator).tolist(), {}, i)
        for c in completions:
            ids = torch.randint(5000, (c,), generator=generator).tolist()
            made.append(Rollout(prompt, Completion(ids, None, 0, "stop"), "", False, advantage=float(len(made) - 3)))
    return made


def packer(**options):
    return Packer(4, 0, torch.device("cuda"), **options)


PACKED = {"packed": True, "share_prompts": True, "max_tokens": 500}


def learn(model, rollouts, options, dtype=None, **scoring):
    """Log-probabilities of all rollouts in their order, and all gradients."""
    model.zero_grad()
    found = {}
    with packed_attention(model) if options.get("packed") else torch.enable_grad():
        for batch in packer(**options).pack(rollouts, StepTotals(8, 1.0, 1)):
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                output = score_tokens(
                    model, model.lm_head, batch, temperature=0.9, entropies=True, entropy_gradient=True, **scoring
                )
            advantages = batch.advantages_B[batch.rows_N]
            (advantages * output.logps_N.exp() + 0.1 * advantages.cos() * output.entropies_N).sum().backward()
            found |= {id(r): v.detach() for r, v in zip(batch.rollouts, batch.split_rows(output.logps_N), strict=True)}
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.cat([found[id(r)] for r in rollouts]), gradients


@pytest.fixture
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_float32_is_exact(model, rollouts, exact_products, checkpointing):
    expected = learn(model, rollouts, {})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for options in (PACKED | {"share_prompts": False}, PACKED):
            logps, gradients = learn(model, rollouts, options, chunk_rows=100)
            assert (logps - expected[0]).abs().max() < 5e-5
            assert (gradients - expected[1]).norm() < 5e-5 * expected[1].norm()
    finally:
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("how", ["autocast", "bfloat16 weights"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_attention_is_as_exact_as_padded_rows(model, rollouts, how, checkpointing, monkeypatch):
    calls = []
    flash = attention._flash
    monkeypatch.setattr(attention, "_flash", lambda *a: calls.append(1) or flash(*a))
    exact = learn(model, rollouts, {})
    tried = copy.deepcopy(model)
    tried = tried.bfloat16() if how == "bfloat16 weights" else tried
    if checkpointing:
        tried.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = torch.bfloat16 if how == "autocast" else None
    usual = learn(tried, rollouts, {}, dtype)
    assert not calls
    for options in (PACKED | {"share_prompts": False}, PACKED):
        logps, gradients = learn(tried, rollouts, options, dtype)
        assert logps.dtype == torch.float32
        error = (logps - exact[0]).abs().mean()
        assert error < 1.5 * (usual[0] - exact[0]).abs().mean()
        distance = (gradients.float() - exact[1]).norm()
        assert distance < 1.5 * (usual[1].float() - exact[1]).norm()
    assert calls


def test_a_packable_model_passes(model):
    for tried in (model, copy.deepcopy(model).bfloat16()):
        assert obstacle(tried, tried.lm_head) is None
        with torch.autocast("cuda", torch.bfloat16):
            assert obstacle(tried, tried.lm_head) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_scores_are_the_unfused(dtype, monkeypatch):
    rows, hidden_size, vocabulary = 300, 64, 3000
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device="cuda", generator=generator)
    weight = torch.randn(vocabulary, hidden_size, device="cuda", generator=generator) * 0.3
    targets = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)

    def run():
        given = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logps, entropies = heads.score_linear(
            *given, None, targets, heads.Logits(cap=20.0, temperature=0.8), dtype=dtype, entropy_gradient=True,
            chunk_rows=128,
        )  # fmt: skip
        (logps.sin() + 0.3 * entropies).sum().backward()
        return logps.detach(), entropies.detach(), *(g.grad for g in given)

    assert heads._compiler_works()
    fused = run()
    monkeypatch.setattr(heads, "_compiled", lambda function, device: function)
    for a, b in zip(fused, run(), strict=True):
        assert (a - b).norm() < (1e-5 if dtype == torch.float32 else 5e-3) * b.norm()


def test_logits_are_never_whole():
    torch.compiler.reset()  # after many kinds of calls in one process dynamo gives up, and nothing is fused any more
    rows, vocabulary = 16384, 65536
    hidden = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    options = {"dtype": torch.bfloat16, "entropy_gradient": False, "chunk_rows": 1024}
    for _ in range(2):  # compiles at first
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps, _ = heads.score_linear(hidden, weight, None, targets, heads.Logits(), **options)
        logps.sum().backward()
    # A chunk has 128 MiB in bfloat16 and all rows have 2 GiB; nothing is kept in float32.
    assert torch.cuda.max_memory_allocated() - before < 450 * 2**20


def test_nothing_waits_for_the_device(rollouts):
    """Neither packing, which goes on while the device computes, nor the passes."""
    model = build("Llama")
    options = PACKED | {"max_tokens": 300}
    learn(model, rollouts, options, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = learn(model, rollouts, options, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == sum(len(r.completion.ids) for r in rollouts)


def test_packed_rows_of_the_usual_size_are_quick(rollouts):
    model = build("Llama").bfloat16()
    many = [copy.copy(r) for _ in range(8) for r in rollouts]

    def seconds(options):
        best = float("inf")
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            learn(model, many, options)
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 1000)
        return best

    padded = seconds({})
    assert seconds({"packed": True, "share_prompts": True, "max_tokens": 8192}) < padded
