"""Chunked log-probabilities and entropies against the whole logits, and what of them is ever in memory."""

from __future__ import annotations

import pytest
import torch
from test_modeling_packed import SHAPE, build, gradients, loss_of
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.modeling import standin
from slipstream.modeling.heads import Logits, score_linear, score_module
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, Prompt, Rollout, StepTotals

N, H, V = 37, 16, 50
LOGITS = [Logits(), Logits(temperature=0.6), Logits(scale=0.25), Logits(scale=3.0, cap=2.0, temperature=1.3)]


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, H), (V, H), (V,)))
    return hidden, weight * 0.5, bias, torch.randint(V, (N,), generator=generator)


def whole(hidden, weight, bias, targets, logits):
    """The same, naively."""
    x = torch.nn.functional.linear(hidden, weight, bias) * logits.scale
    if logits.cap is not None:
        x = logits.cap * torch.tanh(x / logits.cap)
    logps = (x / logits.temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def leaves(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("rows", [1, 5, 37, 100])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_chunks_are_the_whole(parts, logits, rows, entropy_gradient, with_bias, linear):
    hidden, weight, bias, targets = parts
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)
    right = leaves(hidden, weight, bias if with_bias else None)
    expected = whole(*right, targets, logits)
    loss_of(expected[0], expected[1] if entropy_gradient else expected[1].detach(), advantages).backward()
    given = leaves(hidden, weight, bias if with_bias else None)
    options = {"entropy_gradient": entropy_gradient, "chunk_rows": rows}
    if linear:
        found = score_linear(*given, targets, logits, dtype=torch.float64, **options)
    else:
        forward = lambda x: torch.nn.functional.linear(x, *given[1:])  # noqa: E731
        found = score_module(forward, given[0], V, targets, logits, **options)
    loss_of(*found, advantages).backward()
    assert found[1].requires_grad == entropy_gradient
    for values, right_values in zip(found, expected, strict=True):
        assert (values - right_values).abs().max() < 1e-11
    for tensor, right_tensor in zip(given, right, strict=True):
        assert tensor is right_tensor is None or (tensor.grad - right_tensor.grad).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 100])
def test_products_in_a_smaller_dtype(parts, dtype, rows):
    hidden, weight, bias, targets = parts
    right = leaves(hidden, weight, bias)
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)
    expected = whole(*right, targets, Logits(temperature=0.9))
    loss_of(*expected, advantages).backward()
    given = leaves(hidden.float(), weight.float(), bias.float())
    found = score_linear(*given, targets, Logits(temperature=0.9), dtype=dtype, entropy_gradient=True, chunk_rows=rows)
    loss_of(*found, advantages.float()).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert found[0].dtype == torch.float32
    assert (found[0] - expected[0]).abs().max() < 2 * tolerance
    for tensor, right_tensor in zip(given, right, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad - right_tensor.grad).norm() < tolerance * right_tensor.grad.norm()


@pytest.mark.parametrize("linear", [False, True])
def test_logits_are_never_whole(linear):
    rows, hidden_size, vocabulary, chunk = 512, 8, 4096, 32
    hidden, weight = leaves(torch.randn(rows, hidden_size), torch.randn(vocabulary, hidden_size))
    targets = torch.randint(vocabulary, (rows,))
    with Largest() as largest:
        options = {"entropy_gradient": True, "chunk_rows": chunk}
        if linear:
            logps, entropies = score_linear(hidden, weight, None, targets, Logits(), dtype=torch.float32, **options)
        else:
            logps, entropies = score_module(lambda x: x @ weight.T, hidden, vocabulary, targets, Logits(), **options)
        (logps.sum() + entropies.sum()).backward()
    assert largest.numbers == chunk * vocabulary


def test_what_is_frozen_gets_no_gradient(parts):
    hidden, weight, bias, targets = parts
    (hidden,) = leaves(hidden)
    logps, _ = score_linear(
        hidden, weight, bias, targets, Logits(), dtype=torch.float64, entropy_gradient=False, chunk_rows=4
    )
    logps.sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().min() > 0


def test_no_tokens_at_all(parts):
    hidden, weight, _bias, targets = parts
    given = leaves(hidden[:0], weight)
    logps, _ = score_linear(*given, None, targets[:0], Logits(), dtype=torch.float64, entropy_gradient=True)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert not given[1].grad.any()


# Within a model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    rollouts = []
    for i, (p, c) in enumerate([(3, 9), (5, 6), (2, 11)]):
        ids = torch.randint(300, (p + c,), generator=generator).tolist()
        rollouts.append(Rollout(Prompt(ids[:p], {}, i), Completion(ids[p:], None, 0, "stop"), "", False, advantage=i))
    return Packer(9, 0, torch.device("cpu")).micro_batch(rollouts, StepTotals(3, 26.0, 1))


def plain(model, batch, temperature):
    """Log-probabilities, entropies and gradients by transformers' own forward pass."""
    model.zero_grad()
    logits = model(batch.input_ids_BT).logits.flatten(0, 1)[batch.positions_N].double() / temperature
    every = logits.log_softmax(-1)
    logps, entropies = every.gather(-1, batch.targets_N[:, None])[:, 0], -(every.exp() * every).sum(-1)
    loss_of(logps, entropies, batch.advantages_B[batch.rows_N]).backward()
    return logps, entropies, gradients(model)


def ours(model, batch, temperature, **options):
    model.zero_grad()
    output = score_tokens(
        model, model.get_output_embeddings(), batch, temperature=temperature, entropies=True, entropy_gradient=True,
        **options,
    )  # fmt: skip
    loss_of(output.logps_N, output.entropies_N, batch.advantages_B[batch.rows_N]).backward()
    return output.logps_N, output.entropies_N, gradients(model)


def assert_same(found, expected):
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert (found[1] - expected[1]).abs().max() < 1e-5
    assert (found[2] - expected[2]).abs().max() < 1e-5 * expected[2].abs().max()


AFTER_THE_HEAD = {
    "Llama": ({}, Logits()),
    "Gemma2": ({"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 0.7}, Logits(1.0, 0.7)),
    "Cohere": ({"logit_scale": 0.3}, Logits(0.3)),
    "Granite": ({"logits_scaling": 6.0}, Logits(1 / 6)),
    "Phi": ({}, Logits()),  # its head has a bias
}


@pytest.mark.parametrize("name", list(AFTER_THE_HEAD))
@pytest.mark.parametrize("chunk_rows", [3, None])
def test_what_follows_the_head_is_found_out(name, batch, chunk_rows):
    options, right = AFTER_THE_HEAD[name]
    model = build(name, SHAPE | options)
    assert_same(ours(model, batch, 0.8, chunk_rows=chunk_rows), plain(model, batch, 0.8))
    seen = standin.logits_of(model, model.get_output_embeddings(), batch)
    assert seen.scale == pytest.approx(right.scale, rel=1e-6)
    assert seen.cap == (right.cap and pytest.approx(right.cap, rel=1e-6))


def test_what_is_not_known_is_done_with_whole_logits(batch):
    model = build("Llama", SHAPE)

    class Sine(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            answer = self.inner(*args, **kwargs)
            answer.logits = 3 * answer.logits.sin()
            return answer

        def get_output_embeddings(self):
            return self.inner.lm_head

    unusual = Sine(model)
    for options in ({}, {"float32_head": True}):
        assert_same(ours(unusual, batch, 0.8, **options), plain(unusual, batch, 0.8))
    assert standin.logits_of(unusual, model.lm_head, batch) is None


def test_nothing_of_the_size_of_all_logits_in_a_model(batch):
    model = build("Llama", SHAPE | {"vocab_size": 20_000})

    def largest():
        with Largest() as seen:
            output = score_tokens(model, model.lm_head, batch, temperature=1.0, entropies=True, chunk_rows=4)
            output.logps_N.sum().backward()
        return seen.numbers

    assert largest() == model.lm_head.weight.numel()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    assert largest() == 4 * 20_000


def test_a_module_to_save_of_an_adapter(batch):
    from peft import LoraConfig, get_peft_model

    base = build("Llama", SHAPE | {"tie_word_embeddings": False})
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    found = ours(model, batch, 0.8, chunk_rows=5)
    assert_same(found, plain(model, batch, 0.8))
    assert model.get_output_embeddings().modules_to_save["default"].weight.grad.abs().max() > 0


def test_a_head_with_a_forward_of_its_own_keeps_it(batch):
    model = build("Llama", SHAPE | {"tie_word_embeddings": False})
    own = lambda x: torch.nn.functional.linear(x, 2 * model.lm_head.weight)  # noqa: E731
    model.lm_head.forward = own
    assert_same(ours(model, batch, 0.8, chunk_rows=5), plain(model, batch, 0.8))
    assert model.lm_head.forward is own


def test_a_compiled_model(batch):
    model = build("Llama", SHAPE)
    expected = plain(model, batch, 0.8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            model.zero_grad()
            output = score_tokens(
                compiled, model.lm_head, batch, temperature=0.8, entropies=True, entropy_gradient=True
            )
            loss_of(output.logps_N, output.entropies_N, batch.advantages_B[batch.rows_N]).backward()
            assert_same((output.logps_N, output.entropies_N, gradients(model)), expected)
