"""Packed rows and shared prompts against a plain forward and backward pass of each row alone, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from slipstream.modeling import logprobs
from slipstream.modeling.attention import NAME, Layout, packed_attention, row_of
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packable import obstacle
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, Prompt, Rollout, StepTotals

TOTALS = StepTotals(rows=7, tokens=30.0, ranks=1)
# (prompt, completion length): two prompts with several completions, two with one.
GROUPS = [(8, [4, 1, 6]), (3, [5]), (6, [7, 3]), (1, [2])]
SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
# All layers of the first kind are sliding; of seven, the sixth looks at everything.
PACKABLE = {
    "Llama": SHAPE,
    "Llama, untied": SHAPE | {"tie_word_embeddings": False, "mlp_bias": True},
    "Qwen2": SHAPE | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "Qwen3": SHAPE | {"head_dim": 16},
    "Mistral": SHAPE | {"sliding_window": 3},
    "Gemma3": SHAPE | GEMMA | {"num_hidden_layers": 7},
    "Mixtral": SHAPE | EXPERTS,
    "Qwen3Moe": SHAPE | EXPERTS | {"head_dim": 16},
    "Cohere": SHAPE,
    "Granite": SHAPE | {"logits_scaling": 6.0},
    "GPT2": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} | {"resid_pdrop": 0.0},
}
UNPACKABLE = {
    "Gemma2": (SHAPE | GEMMA, "softcap"),
    "Mamba": ({"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "from one row to the"),
    "Lfm2": (SHAPE | {"full_attn_idxs": [0], "block_auto_adjust_ff_dim": False}, "from one row to the next"),
    "Bloom": ({"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "Bloom|Mask"),
    "Llama4": (SHAPE | EXPERTS | {"head_dim": 16, "attention_chunk_size": 4}, "attention_chunk_size=4"),
}


def build(name, options, **more):
    """A model with weights large enough that every token matters."""
    kind = name.split(",")[0]
    text = kind in ("Gemma3", "Llama4")
    config = getattr(transformers, f"{kind}TextConfig" if text else f"{kind}Config")(**options, **more)
    for field in ("attention_dropout", "attn_pdrop", "embd_pdrop"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=list(PACKABLE))
def model(request):
    return build(request.param, PACKABLE[request.param])


@pytest.fixture(scope="module")
def llama():
    return build("Llama", PACKABLE["Llama"])


def make_rollouts(groups=GROUPS):
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, (p, completions) in enumerate(groups):
        prompt = Prompt(torch.randint(300, (p,), generator=generator).tolist(), {}, i)
        for c in completions:
            ids = torch.randint(300, (c,), generator=generator).tolist()
            made.append(Rollout(prompt, Completion(ids, None, 0, "stop"), "", False, advantage=float(len(made) - 3)))
    return made


@pytest.fixture
def rollouts():
    return make_rollouts()


def loss_of(logps, entropies, advantages):
    """Any loss that is not linear, so that each token has a gradient of its own."""
    return (advantages * logps.exp() + 0.1 * entropies * advantages.cos()).sum()


def gradients(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def alone(model, rollouts, temperature=1.0):
    """Log-probabilities, entropies and gradients of each row alone, the plain way in float64."""
    twin = copy.deepcopy(model).double().eval()
    twin.config._experts_implementation = "eager"  # the grouped product does not know float64
    twin.zero_grad()
    logps, entropies = [], []
    for rollout in rollouts:
        prompt, completion = rollout.prompt.ids, rollout.completion.ids
        logits = twin(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        every = (logits / temperature).log_softmax(-1)
        logps.append(every.gather(-1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(every.exp() * every).sum(-1))
        loss_of(logps[-1], entropies[-1], torch.full_like(logps[-1], rollout.advantage)).backward()
    return [x.detach() for x in logps], [x.detach() for x in entropies], gradients(twin)


def learn(model, batches, **options):
    """The same from micro-batches."""
    model.zero_grad()
    logps, entropies = {}, {}
    with packed_attention(model):
        for batch in batches:
            head = model.get_output_embeddings()
            output = score_tokens(
                model, head, batch, **{"temperature": 1.0, "entropies": True, "entropy_gradient": True} | options
            )
            loss_of(output.logps_N, output.entropies_N, batch.advantages_B[batch.rows_N]).backward()
            for rollout, a, b in zip(
                batch.rollouts, batch.split_rows(output.logps_N), batch.split_rows(output.entropies_N), strict=True
            ):
                logps[id(rollout)], entropies[id(rollout)] = a.detach(), b.detach()
    return logps, entropies, gradients(model)


def assert_equal(found, expected, rollouts, tolerance=1e-5):
    for values, right in zip(found[:2], expected[:2], strict=True):
        for rollout, right_values in zip(rollouts, right, strict=True):
            assert (values[id(rollout)] - right_values).abs().max() < tolerance
    assert (found[2] - expected[2]).abs().max() < tolerance * expected[2].abs().max()


def packer(**options):
    return Packer(4, 0, torch.device("cpu"), **{"packed": True, "max_tokens": 24} | options)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_the_rows_alone(model, rollouts, share, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
        batches = list(packer(share_prompts=share).pack(rollouts, TOTALS))
        assert len(batches) > 1
        assert any(s.parent is not None for b in batches for s in b.segments) == share
        assert_equal(learn(model, batches), alone(model, rollouts), rollouts)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_transformers_does_not_look_for_rows_itself(llama, rollouts, monkeypatch):
    """It would, without a mask, and a GPU would have to be waited for."""
    batches = list(packer(packed=True, share_prompts=True).pack(rollouts, TOTALS))
    expected = learn(llama, batches)[2]

    def looks(*args):
        raise AssertionError("the positions are looked at")

    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", looks)
    assert torch.equal(learn(llama, batches)[2], expected)


def test_a_layout_made_ahead_is_used(llama, rollouts, monkeypatch):
    batches = list(packer(packed=True, share_prompts=True).pack(rollouts, TOTALS))
    expected = learn(llama, batches)[2]
    for batch in batches:
        batch.layout = Layout(batch.segments, torch.device("cpu"))
        batch.layout.prepare()
    seen = []
    monkeypatch.setattr(logprobs, "row_of", lambda layout: seen.append(layout) or row_of(layout))
    assert torch.equal(learn(llama, batches)[2], expected)
    assert [id(layout) for layout in seen] == [id(batch.layout) for batch in batches]


def test_micro_batches_are_made_one_by_one(rollouts, monkeypatch):
    made = []
    plain = Packer.packed_micro_batch
    monkeypatch.setattr(
        Packer, "packed_micro_batch", lambda *args, **options: made.append(1) or plain(*args, **options)
    )
    batches = packer(packed=True, max_tokens=20).pack(rollouts, TOTALS)
    assert len(next(batches).rollouts) >= 1
    assert len(made) == 1
    assert len(list(batches)) >= 2


def test_a_packable_model_passes(model):
    assert obstacle(model, model.get_output_embeddings()) is None


@pytest.mark.parametrize("name", list(UNPACKABLE))
def test_what_cannot_be_packed_is_found(name):
    options, reason = UNPACKABLE[name]
    found = obstacle((model := build(name, options)), model.get_output_embeddings())
    assert found is not None
    if "|" not in reason:
        assert reason in found


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe", "Gemma3", "GPT2"])
def test_the_trial_bears_the_rounding_of_bfloat16(name):
    model = build(name, PACKABLE[name]).bfloat16()
    assert obstacle(model, model.get_output_embeddings()) is None


def test_positions_that_are_left_out_are_found(llama):
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("GPT2", PACKABLE["GPT2"])

        def forward(self, input_ids, position_ids=None, **kwargs):
            return self.inner(input_ids=input_ids, **kwargs)

    model = Deaf()
    assert "position_ids" in obstacle(model, model.inner.lm_head)


def test_the_trial_leaves_the_model_as_it_was(llama):
    model = copy.deepcopy(llama).train()
    model.model.layers[0].eval()
    before = torch.random.get_rng_state()
    obstacle(model, model.lm_head)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)


@pytest.mark.parametrize("name", ["Gemma2", "Mamba"])
def test_padded_rows_of_what_cannot_be_packed_are_right(name, rollouts):
    model = build(name, UNPACKABLE[name][0])
    batches = list(Packer(3, 0, torch.device("cpu")).pack(rollouts, TOTALS))
    if name == "Gemma2":
        model.set_attn_implementation("eager")  # the other kind leaves softcapping of attention out
    model.zero_grad()
    logps = {}
    for batch in batches:
        output = score_tokens(model, model.lm_head, batch, temperature=0.7, entropies=True, entropy_gradient=True)
        loss_of(output.logps_N, output.entropies_N, batch.advantages_B[batch.rows_N]).backward()
        logps |= {id(r): v.detach() for r, v in zip(batch.rollouts, batch.split_rows(output.logps_N), strict=True)}
    expected, _, gradient = alone(model, rollouts, temperature=0.7)
    assert all((logps[id(r)] - e).abs().max() < 1e-5 for r, e in zip(rollouts, expected, strict=True))
    assert (gradients(model) - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Gemma3"])
def test_autocast_in_bfloat16(name, rollouts):
    model = build(name, PACKABLE[name])
    expected = alone(model, rollouts)
    batches = list(packer(share_prompts=True).pack(rollouts, TOTALS))
    with torch.autocast("cpu", torch.bfloat16):
        found = learn(model, batches)
    padded = list(Packer(4, 0, torch.device("cpu")).pack(rollouts, TOTALS))
    with torch.autocast("cpu", torch.bfloat16):
        usual = learn_padded(model, padded)
    # As close to the exact values as padded rows are, within a factor.
    error, usual_error = ((g - expected[2]).norm() / expected[2].norm() for g in (found[2], usual))
    assert error < max(2 * usual_error, 0.02)
    assert found[0][id(rollouts[0])].dtype == torch.float32
    assert all((found[0][id(r)] - e).abs().max() < 0.1 for r, e in zip(rollouts, expected[0], strict=True))


def learn_padded(model, batches):
    model.zero_grad()
    for batch in batches:
        output = score_tokens(model, model.lm_head, batch, temperature=1.0, entropies=True, entropy_gradient=True)
        loss_of(output.logps_N, output.entropies_N, batch.advantages_B[batch.rows_N]).backward()
    return gradients(model)


def test_dropout_of_attention_is_applied(rollouts):
    model = build("Llama", PACKABLE["Llama"], attention_dropout=0.5)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    (batch,) = packer(max_tokens=999).pack(rollouts, TOTALS)

    def score():
        return score_tokens(model, model.lm_head, batch, temperature=1.0).logps_N

    with torch.no_grad():
        exact = score()
        model.train()
        first, second = score(), score()
    assert (first - exact).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


def test_attention_is_as_before_afterwards(llama, rollouts):
    ids = torch.tensor([[1, 2, 3]])
    before = llama(ids).logits
    with packed_attention(llama), packed_attention(llama):
        assert llama.config._attn_implementation == NAME
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(llama(ids).logits, before)
    assert NAME not in str(llama.config.to_dict())


def test_a_backward_pass_outside_is_an_error(llama, rollouts):
    (batch,) = packer(max_tokens=999).pack(rollouts, TOTALS)
    output = score_tokens(llama, llama.lm_head, batch, temperature=1.0)
    with pytest.raises(RuntimeError, match="must run within `packed_attention"):
        output.logps_N.sum().backward()


def test_a_plain_batch_inside_is_an_error(llama):
    with packed_attention(llama), pytest.raises(RuntimeError, match="plain batch"):
        llama(torch.tensor([[1, 2, 3]]))


def test_an_adapter_learns_the_same_from_packed_rows(rollouts):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build("Llama", PACKABLE["Llama"]), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    expected = alone(model, rollouts)
    for chunk_rows in (None, 5):
        batches = list(packer(share_prompts=True).pack(rollouts, TOTALS))
        assert_equal(learn(model, batches, chunk_rows=chunk_rows), expected, rollouts)
    assert "lora" in next(n for n, p in model.named_parameters() if p.grad is not None)


def test_the_balance_of_experts_is_that_of_all_tokens(rollouts):
    model = build("Mixtral", PACKABLE["Mixtral"])
    batches = [
        Packer(9, 0, torch.device("cpu")).micro_batch(rollouts, TOTALS),
        *packer(max_tokens=999).pack(rollouts, TOTALS),
        *packer(max_tokens=999, pad_to_multiple_of=64).pack(rollouts, TOTALS),  # padding is no token
    ]
    losses = [score_tokens(model, model.lm_head, b, temperature=1.0, router_loss=True).router_loss for b in batches]
    assert batches[1].input_ids_BT.shape[1] % 64
    assert losses[0] > 0
    for found in losses[1:]:
        assert torch.allclose(losses[0], found, atol=1e-6)


def test_a_compiled_model_with_packed_rows(rollouts):
    model = build("Llama", SHAPE | {"num_hidden_layers": 1})
    expected = alone(model, rollouts)
    torch._dynamo.reset()
    model.compile(backend="eager")
    batches = list(packer(share_prompts=True, max_tokens=20).pack(rollouts, TOTALS))
    # The second batch has another length, and shows that lengths may vary; the third needs nothing new.
    learn(model, batches[:2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal(learn(model, batches), expected, rollouts)
