"""Micro-batches and log-probabilities against a plain forward pass of each row alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, Prompt, Rollout, StepTotals

TOTALS = StepTotals(rows=5, tokens=20.0, ranks=1)
LENGTHS = [(3, 4), (9, 1), (2, 7), (5, 5), (1, 3)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def rollouts():
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, (p, c) in enumerate(LENGTHS):
        ids = torch.randint(5, 90, (p + c,), generator=generator).tolist()
        completion = Completion(ids[p:], None, 0, "stop")
        made.append(Rollout(Prompt(ids[:p], {}, i), completion, "", False, advantage=float(i)))
        made[-1].extra["sampler_logps"] = torch.arange(c, dtype=torch.float32) + 10 * i
    return made


def alone(model, rollout, temperature):
    """Log-probabilities and entropies of one row, the plain way."""
    prompt, completion = rollout.prompt.ids, rollout.completion.ids
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double() / temperature
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]
    return picked, -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_scores_are_those_of_each_row_alone(model, rollouts, rows, temperature):
    seen = 0
    for batch in Packer(rows, 0, torch.device("cpu")).pack(rollouts, TOTALS):
        output = score_tokens(model, model.lm_head, batch, temperature=temperature, entropies=True)
        parts = zip(batch.rollouts, batch.split_rows(output.logps_N), batch.split_rows(output.entropies_N), strict=True)
        for rollout, logps, entropies in parts:
            expected_logps, expected_entropies = alone(model, rollout, temperature)
            assert (logps - expected_logps).abs().max() < 1e-5
            assert (entropies - expected_entropies).abs().max() < 1e-5
            seen += 1
    assert seen == len(rollouts)


def test_the_gradient_does_not_depend_on_the_split(model, rollouts):
    def gradient(rows):
        model.zero_grad()
        for batch in Packer(rows, 0, torch.device("cpu")).pack(rollouts, TOTALS):
            output = score_tokens(model, model.lm_head, batch, temperature=1.0)
            (output.logps_N * batch.advantages_B[batch.rows_N]).sum().div(batch.totals.tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(5)
    for rows in (1, 2, 3):
        assert (gradient(rows) - whole).abs().max() < 1e-6 * whole.abs().max()


def test_a_micro_batch_holds_every_completion_token_once(rollouts):
    batches = list(Packer(2, 0, torch.device("cpu")).pack(rollouts, TOTALS))
    assert [len(b.rollouts) for b in batches] == [2, 2, 1]
    for batch in batches:
        targets = batch.split_rows(batch.targets_N)
        predicted_at = batch.positions_N + 1
        assert torch.equal(batch.input_ids_BT.flatten()[predicted_at], batch.targets_N)
        for i, rollout in enumerate(batch.rollouts):
            assert targets[i].tolist() == rollout.completion.ids
            assert batch.advantages_B[i] == rollout.advantage
            given = batch.per_token["sampler_logps"][batch.rows_N == i]
            assert torch.equal(given, rollout.extra["sampler_logps"])


def test_rows_of_similar_length_stand_together(rollouts):
    batches = list(Packer(2, 0, torch.device("cpu")).pack(rollouts, TOTALS))
    padded = sum(b.input_ids_BT.numel() for b in batches)
    assert padded == 2 * 10 + 2 * 9 + 4


def test_rows_outside_the_loss_have_no_mask(rollouts):
    rollouts[1].in_loss = False
    (batch,) = Packer(9, 0, torch.device("cpu")).pack(rollouts, TOTALS)
    for i, rollout in enumerate(batch.rollouts):
        assert (batch.mask_N[batch.rows_N == i] == float(rollout.in_loss)).all()


def test_a_value_that_a_row_lacks_is_left_out(rollouts):
    del rollouts[0].extra["sampler_logps"]
    (batch,) = Packer(9, 0, torch.device("cpu")).pack(rollouts, TOTALS)
    assert batch.per_token == {}


def test_a_model_that_bypasses_its_head_is_an_error(model, rollouts):
    (batch,) = Packer(9, 0, torch.device("cpu")).pack(rollouts, TOTALS)
    with pytest.raises(RuntimeError, match="cannot be trained here"):
        score_tokens(model, torch.nn.Linear(2, 2), batch, temperature=1.0)


def test_the_head_is_left_as_it_was(model, rollouts):
    (batch,) = Packer(9, 0, torch.device("cpu")).pack(rollouts, TOTALS)
    score_tokens(model, model.lm_head, batch, temperature=1.0)
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, model.config.vocab_size)


def test_padding_to_a_multiple(rollouts):
    packer = Packer(2, 0, torch.device("cpu"), pad_to_multiple_of=8)
    assert [b.input_ids_BT.shape[1] for b in packer.pack(rollouts, TOTALS)] == [16, 16, 8]


def test_a_float32_head_keeps_what_bfloat16_loses(tiny_model, rollouts):
    rough = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    (batch,) = Packer(9, 0, torch.device("cpu")).pack(rollouts, TOTALS)
    hidden = rough.model(batch.input_ids_BT).last_hidden_state.flatten(0, 1)[batch.positions_N]
    exact = (hidden.double() @ rough.lm_head.weight.double().T).log_softmax(-1)
    expected = exact.gather(-1, batch.targets_N[:, None])[:, 0]

    def error(**options):
        output = score_tokens(rough, rough.lm_head, batch, temperature=1.0, **options)
        return (output.logps_N - expected).abs().max()

    assert error(float32_head=True) < 1e-5 < error()
    assert rough(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16


def test_entropies_have_a_gradient_only_when_asked(model, rollouts):
    (batch,) = Packer(9, 0, torch.device("cpu")).pack(rollouts, TOTALS)
    for wanted in (True, False):
        output = score_tokens(model, model.lm_head, batch, temperature=1.0, entropies=True, entropy_gradient=wanted)
        assert output.entropies_N.requires_grad == wanted
        assert output.logps_N.requires_grad


def test_padding_does_not_count_in_the_balance_of_experts(rollouts):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    experts = MixtralForCausalLM(config).eval()
    losses = []
    for multiple in (1, 32):
        (batch,) = Packer(9, 0, torch.device("cpu"), multiple).pack(rollouts, TOTALS)
        losses.append(score_tokens(experts, experts.lm_head, batch, temperature=1.0, router_loss=True).router_loss)
    assert losses[0] > 0
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
