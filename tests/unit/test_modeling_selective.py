"""Layers that keep their products, and attention, against layers that keep everything."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import transformers
from test_modeling_packed import make_rollouts
from test_trainer_docs import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from slipstream.modeling import selective
from slipstream.modeling.attention import packed_attention
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packing import Packer
from slipstream.records import StepTotals

sys.path.insert(0, str(ROOT / "benchmarks"))
from training_step import LiveBytes

GROUPS = [(8, [14, 30, 26]), (30, [25]), (20, [17, 3])]
ROWS = {"padded": {}, "packed": {"packed": True}, "shared": {"packed": True, "share_prompts": True}}
# As wide as products must be to be kept, and in the proportions of a model of 1.5B parameters.
SHAPE = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 1493, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64}
GPT2 = {"vocab_size": 300, "n_embd": 256, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "Qwen2": SHAPE,
    "Llama": SHAPE,
    "Llama, attention drops": SHAPE | {"attention_dropout": 0.3},
    "GPT2, everything drops": GPT2,
    "GPT2, layers drop": GPT2 | {"attn_pdrop": 0.0},
    "Qwen3Moe": SHAPE | EXPERTS,
}


def build(name, options, **more):
    kind = name.split(",")[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**options, **more)
        return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).train()


def switch(model, how):
    model.gradient_checkpointing_disable()
    if how != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "selective":
        selective.switch_on(model)


def step(model, rows, within=None, **options):
    """The loss and all gradients of a micro-batch, and bytes alive between its passes."""
    model.zero_grad()
    packer = Packer(9, 0, torch.device("cpu"), **ROWS[rows], max_tokens=999)
    (batch,) = packer.pack(make_rollouts(GROUPS), StepTotals(6, 100.0, 1))
    torch.manual_seed(0)
    with packed_attention(model) if packer.packed else nullcontext(), within or nullcontext():
        output = score_tokens(
            model, model.get_output_embeddings(), batch, temperature=0.9, entropies=True, entropy_gradient=True,
            **options,
        )  # fmt: skip
        loss = (batch.advantages_B[batch.rows_N] * output.logps_N.exp() + 0.1 * output.entropies_N).sum()
        loss = loss if output.router_loss is None else loss + output.router_loss
        alive = getattr(within, "now", 0)
        loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], *gradients]), alive


class Calls(TorchDispatchMode):
    """Counts operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self):
        return sum(self.made[name] for name in ("aten::mm", "aten::addmm", "aten::_grouped_mm"))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_layers_that_keep_everything(name, rows):
    model = build(name, MODELS[name])
    options = {"router_loss": True} if name == "Qwen3Moe" and rows != "shared" else {}
    found = {}
    for how in ("off", "on", "selective"):
        switch(model, how)
        found[how] = [step(model, rows, calls := Calls(), **options)[0] for _ in range(2)], calls
    for gradients in found["selective"][0]:
        assert torch.equal(gradients, found["off"][0][0])
    off, on, chosen = (found[how][1] for how in ("off", "on", "selective"))
    assert off.products == chosen.products < on.products
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    if "drop" not in name:
        assert off.made[attention] == chosen.made[attention] < on.made[attention]


@pytest.mark.parametrize("rows", ROWS)
def test_a_layer_keeps_less_than_half(rows):
    kept = {}
    for how in ("off", "on", "selective"):
        alive = []
        for layers in (1, 2):
            model = build("Qwen2", SHAPE | {"num_hidden_layers": layers}).bfloat16()
            switch(model, how)
            alive.append(step(model, rows, LiveBytes())[1])
        kept[how] = alive[1] - alive[0]
    assert kept["on"] < kept["selective"] < 0.5 * kept["off"]


def test_mixed_precision():
    model, found = build("Llama", SHAPE), {}
    for how in ("off", "selective"):
        switch(model, how)
        with torch.autocast("cpu", torch.bfloat16):
            found[how] = [step(model, "shared", calls := Calls())[0] for _ in range(2)][1], calls.products
    assert torch.equal(found["off"][0], found["selective"][0])
    assert found["off"][1] == found["selective"][1]


def test_an_adapter():
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.2}
        model = get_peft_model(build("Llama", SHAPE), LoraConfig(**options))
    found = {}
    for how in ("off", "on", "selective"):
        switch(model, how)
        found[how] = [step(model, "packed", calls := Calls())[0] for _ in range(2)][1], calls.products
    assert torch.equal(found["off"][0], found["selective"][0])
    # The second factors are computed again, the rest is not.
    assert found["off"][1] < found["selective"][1] < found["on"][1]


class Unseen(torch.autograd.Function):
    """Three times its argument, written over it behind torch's back, as some kernels do."""

    @staticmethod
    def forward(ctx, x):
        x.detach().numpy()[...] *= 3
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def plain(x, w):
    return (x @ w).sin() @ w


def written(x, w):
    return (x @ w).add_(1.0).sin() @ w


def written_through_a_view(x, w):
    y = x @ w
    y[:2].mul_(2.0)
    return y.sin() @ w


def written_unseen(x, w):
    return Unseen.apply(x @ w).sin() @ w


def twice(x, w):
    return ((x @ w).sin() @ w).cos() @ w


def gradients_of(function, times=1, **options):
    """Those of the second of two passes, and how many products it took."""
    x, w = (torch.randn(256, 256, generator=torch.Generator().manual_seed(i)) / 16 for i in (0, 1))
    x, w = x.requires_grad_(), w.requires_grad_()
    for _ in range(2):
        with Calls() as calls:
            result = checkpoint(function, x, w, use_reentrant=False, **options) if options else function(x, w)
            for i in range(times):
                x.grad = w.grad = None
                (x + result).square().sum().backward(retain_graph=i < times - 1)
    return torch.cat([x.grad, w.grad]), calls.products


@pytest.mark.parametrize("function", [plain, written, written_through_a_view, written_unseen, twice])
def test_what_is_written_into_is_computed_again(function):
    expected, products = gradients_of(function)
    found, more = gradients_of(function, context_fn=selective.context_fn())
    assert torch.equal(found, expected)
    assert more == products + ("written" in function.__name__)


def test_a_write_that_changes_nothing_at_first():
    added, options = torch.zeros(()), {"context_fn": selective.context_fn()}

    def function(x, w):
        return (x @ w).add_(added).sin() @ w

    for value in (0.0, 1.0):
        added.fill_(value)
        assert torch.equal(gradients_of(function, **options)[0], gradients_of(function)[0])


ATTENDED = []


@torch.library.custom_op("slipstream_tests::attend", mutates_args=())
def attend(x: torch.Tensor, dropout_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Something that is taken for attention, and draws random numbers."""
    ATTENDED.append(dropout_p)
    kept = torch.rand_like(x) >= dropout_p
    return x * kept, kept


attend.register_autograd(
    lambda ctx, gradient, _: (gradient * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_random_numbers_are_those_of_the_forward_pass(monkeypatch, dropout):
    monkeypatch.setattr(selective, "ATTENTION", {"slipstream_tests::attend"})

    def function(x, w):
        return torch.nn.functional.dropout(attend(x @ w, dropout)[0], dropout).sin() @ w

    torch.manual_seed(0)
    expected, _ = gradients_of(function)
    torch.manual_seed(0)
    ATTENDED.clear()
    found, _ = gradients_of(function, context_fn=selective.context_fn())
    assert torch.equal(found, expected)
    # Twice in the first pass, which compares; then only where it has to draw again.
    assert len(ATTENDED) == (3 if dropout == 0 else 4)


def test_a_second_backward_pass_computes_everything_again():
    expected, _ = gradients_of(twice)
    assert torch.equal(gradients_of(twice, times=2, context_fn=selective.context_fn())[0], expected)


def test_a_layer_that_has_changed_is_an_error():
    calls = []

    def fickle(x, w):
        calls.append(1)
        y = x @ w if len(calls) % 2 else torch.addmm(x, x, w)
        return y.sin() @ w

    with pytest.raises(RuntimeError, match=r"aten.mm.default in its forward pass and computes aten.addmm.default"):
        gradients_of(fickle, context_fn=selective.context_fn())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    options = {"context_fn": selective.context_fn()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: checkpoint(twice, x, w, use_reentrant=False, **options), backend=backend)
    assert torch.allclose(gradients_of(compiled)[0], gradients_of(twice)[0], rtol=1e-5, atol=1e-6)


def test_a_model_without_checkpointing_is_an_error():
    with pytest.raises(
        ValueError, match=r"selective_checkpointing=True does not work with Linear.*set selective_check"
    ):
        selective.switch_on(torch.nn.Linear(2, 2))


def test_the_names_of_operations_are_torchs():
    known = set(torch._C._dispatch_get_all_op_names())
    assert {n for n in (*selective.PRODUCTS, *selective.ATTENTION, *selective.SUMS) if n.startswith("aten")} <= known
