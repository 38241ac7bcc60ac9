"""Objectives against a second, naive writing of their formulas: Python loops over rows and tokens, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.objectives import grpo
from slipstream.objectives.advantages import combine_rewards, decoupled_advantages, group_advantages, nanstd
from slipstream.objectives.correction import sampler_correction
from slipstream.objectives.policy import clipped_surrogate, kl_k3
from slipstream.objectives.rloo import leave_one_out_advantages
from slipstream.objectives.segments import row_mean, row_sum
from slipstream.records import StepTotals
from slipstream.trainers.metrics import reward_metrics

rows_of_lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any)
LEVELS = ("token", "sequence", "sequence_geometric")
MODES = [f"{level}_{action}" for level in LEVELS for action in ("truncate", "mask")]


def ragged(lengths: list[int], seed: int, scale: float = 1.0) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator, dtype=torch.float64) * scale).tolist() for n in lengths]


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([v for row in rows for v in row], dtype=torch.float64)


def owners(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])


@given(rows_of_lengths, st.integers(0, 1000))
def test_row_sums_and_means_are_those_of_loops(lengths, seed):
    values = ragged(lengths, seed)
    mask = [[float((seed + i + j) % 3 > 0) for j in range(n)] for i, n in enumerate(lengths)]
    sums = row_sum(flat(values), owners(lengths), len(lengths)).tolist()
    means = row_mean(flat(values), flat(mask), owners(lengths), len(lengths)).tolist()
    for i, row in enumerate(values):
        kept = [v for v, m in zip(row, mask[i], strict=True) if m]
        assert sums[i] == pytest.approx(sum(row))
        assert means[i] == pytest.approx(sum(kept) / max(len(kept), 1))


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 1000), st.floats(0, 0.5))
def test_group_advantages_are_those_of_loops(groups, size, seed, missing):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(groups * size, generator=generator, dtype=torch.float64)
    rewards[torch.rand(groups * size, generator=generator) < missing] = torch.nan
    advantages = group_advantages(rewards, size).tolist()
    for g in range(groups):
        group = rewards[g * size : (g + 1) * size].tolist()
        scored = [r for r in group if not math.isnan(r)]
        mean = sum(scored) / len(scored) if scored else 0.0
        std = math.sqrt(sum((r - mean) ** 2 for r in scored) / (len(scored) - 1)) if len(scored) > 1 else 0.0
        for i, r in enumerate(group):
            expected = 0.0 if math.isnan(r) else (r - mean) / (std + 1e-4)
            assert advantages[g * size + i] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3, 7, 8, 12, 16])
@pytest.mark.parametrize("reward", [0.7, 3.3, 100.1, -1000.1])
def test_equal_rewards_teach_nothing(reward, size):
    # In float32 the mean of eight times 3.3 is another number than 3.3.
    rewards = torch.full((2 * size,), reward)
    assert group_advantages(rewards, size).abs().max() == 0
    assert group_advantages(rewards, size, "batch").abs().max() == 0
    assert decoupled_advantages(rewards.unsqueeze(1), torch.ones(1), size).abs().max() == 0
    assert leave_one_out_advantages(rewards, size, normalize=True).abs().max() == 0
    assert reward_metrics(rewards.unsqueeze(1), torch.ones(1), ["f"], size)["frac_reward_zero_std"] == 1


def test_advantages_have_the_rewards_type():
    rewards = torch.tensor([1.0, 2.0, torch.nan, 4.0])
    for advantages in (group_advantages(rewards, 2), leave_one_out_advantages(rewards, 2), nanstd(rewards, dim=0)):
        assert advantages.dtype == rewards.dtype
    assert decoupled_advantages(rewards.unsqueeze(1), torch.ones(1), 2).dtype == rewards.dtype


def test_rewards_combine_over_the_functions_that_could_score():
    nan = torch.nan
    rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [1.0, nan], [nan, nan]])
    combined = combine_rewards(rewards, torch.tensor([1.0, 0.5]))
    assert combined[:3].tolist() == [2.0, 1.0, 1.0]
    assert combined[3].isnan()


def test_nanstd_has_bessels_correction():
    values = torch.tensor([1.0, 2.0, torch.nan, 4.0])
    assert nanstd(values, dim=0).item() == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())
    assert nanstd(torch.tensor([3.0, torch.nan]), dim=0) == 0


@given(rows_of_lengths, st.integers(0, 1000), st.floats(0.01, 0.5), st.floats(0.01, 0.9))
def test_clipped_surrogate_is_ppos(lengths, seed, low, high):
    ratio, advantages = ragged(lengths, seed, 0.5), ragged(lengths, seed + 1)
    ratio = [[math.exp(v) for v in row] for row in ratio]
    loss, at_low, at_high = clipped_surrogate(flat(ratio), flat(advantages), low, high)
    expected = [
        -min(r * a, min(max(r, 1 - low), 1 + high) * a)
        for rs, as_ in zip(ratio, advantages, strict=True)
        for r, a in zip(rs, as_, strict=True)
    ]
    assert loss.tolist() == pytest.approx(expected)
    for i, (r, a) in enumerate(zip(flat(ratio).tolist(), flat(advantages).tolist(), strict=True)):
        assert at_low[i] == (r < 1 - low and a < 0)
        assert at_high[i] == (r > 1 + high and a > 0)


def test_clipped_surrogate_has_the_gradient_of_its_formula():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.6], dtype=torch.float64, requires_grad=True)
    for sign in (1.0, -1.0):
        advantages = torch.full((5,), sign, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda r, a=advantages: clipped_surrogate(r, a, 0.2, 0.3)[0], ratio)
    (gradient,) = torch.autograd.grad(clipped_surrogate(ratio, torch.ones(5), 0.2, 0.3)[0].sum(), ratio)
    assert gradient.tolist() == [-1, -1, -1, -1, 0]


@given(st.integers(0, 1000))
def test_k3_is_its_formula_and_never_negative(seed):
    logps, ref = torch.tensor(ragged([50, 50], seed), dtype=torch.float64)
    estimate = kl_k3(logps, ref)
    assert estimate.min() >= 0
    expected = [math.exp(r - p) - (r - p) - 1 for p, r in zip(logps.tolist(), ref.tolist(), strict=True)]
    assert estimate.tolist() == pytest.approx(expected)


def test_k3_is_unbiased():
    policy = torch.log_softmax(torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0)
    ref = torch.log_softmax(torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 0)
    exact = (policy.exp() * (policy - ref)).sum()
    assert (policy.exp() * kl_k3(policy, ref)).sum().item() == pytest.approx(exact.item())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25)
@given(rows_of_lengths, st.integers(0, 1000), st.sampled_from([(None, 1.5), (0.7, None), (0.5, 2.0)]))
def test_sampler_correction_is_that_of_loops(mode, lengths, seed, bounds):
    trainer, sampler = ragged(lengths, seed, 0.4), ragged(lengths, seed + 1, 0.4)
    mask = [[float((seed + i + 2 * j) % 4 > 0) for j in range(n)] for i, n in enumerate(lengths)]
    low, high = bounds
    got = sampler_correction(
        flat(trainer), flat(sampler), flat(mask), owners(lengths), len(lengths), mode, low, high
    ).weights_N.tolist()

    def bounded(ratio: float) -> float:
        if mode.endswith("truncate"):
            return min(max(ratio, low or 0.0), high or math.inf)
        return ratio if (low or 0.0) <= ratio <= (high or math.inf) else 0.0

    expected = []
    for t, s, m in zip(trainer, sampler, mask, strict=True):
        deltas = [(a - b) * c for a, b, c in zip(t, s, m, strict=True)]
        whole = sum(deltas)
        if "geometric" in mode:
            whole /= max(sum(m), 1)
        expected += [bounded(math.exp(d if mode.startswith("token") else whole)) for d in deltas]
    assert got == pytest.approx(expected)


def test_correction_of_equal_probabilities_is_one_and_constant():
    logps = torch.randn(4, requires_grad=True)
    rows = torch.zeros(4, dtype=torch.long)
    correction = sampler_correction(logps, logps.detach(), torch.ones(4), rows, 1, "sequence_mask", None, 3.0)
    assert correction.weights_N.tolist() == [1, 1, 1, 1]
    assert not correction.weights_N.requires_grad
    assert correction.changed.sum() == 0


def test_tokens_outside_the_mask_have_ratio_one_whatever_the_sampler_said():
    logps, sampler = torch.zeros(4), torch.tensor([0.0, torch.nan, -torch.inf, -0.5])
    rows, mask = torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    for mode in MODES:
        correction = sampler_correction(logps, sampler, mask, rows, 3, mode, None, 3.0)
        assert correction.weights_N.tolist() == pytest.approx([1, 1, 1, math.exp(0.5)])
        assert correction.counts.tolist() == ([1, 0, 0, 1] if mode.startswith("token") else [1, 0, 1])


def test_huge_ratios_are_masked_without_infinities():
    logps, rows = torch.full((200,), 10.0), torch.zeros(200, dtype=torch.long)
    for mode in MODES:
        weights = sampler_correction(logps, -logps, torch.ones(200), rows, 1, mode, None, 3.0).weights_N
        assert weights.isfinite().all()
        assert weights.max() <= 3.0


def test_every_objective_has_the_gradient_of_its_value():
    """gradcheck compares autograd with finite differences."""
    generator = torch.Generator().manual_seed(5)

    def random(n, scale=0.4):
        return torch.randn(n, generator=generator, dtype=torch.float64) * scale

    rows, mask = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
    advantages, ref = torch.tensor([1.0, 1, 1, -0.5, -0.5, 0.7], dtype=torch.float64), random(6)
    totals = StepTotals(rows=4, tokens=5.0, ranks=2)
    functions = [
        lambda x: row_sum(x, rows, 4),
        lambda x: row_mean(x, mask, rows, 4),
        lambda x: kl_k3(x, ref),
        lambda x: grpo.log_weights(x, mask, rows, 4, "token"),
        lambda x: grpo.log_weights(x, mask, rows, 4, "sequence"),
        lambda x: grpo.sapo(x.exp(), advantages, 1.0, 1.05),
        # CISPO's weight is a constant by definition: only the log-probability has a gradient.
        lambda x: grpo.cispo(torch.full_like(x, 1.7), advantages, x, 2.0)[0],
        lambda x: clipped_surrogate(x.exp(), advantages, 0.2, 0.3, 1.5)[0],
        *(lambda x, kind=kind: grpo.aggregate(kind, x, mask, rows, totals, 4, 9) for kind in grpo.LOSS_TYPES),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, random(6).requires_grad_())


def test_weights_that_are_constants_have_no_gradient():
    logps = torch.randn(4, requires_grad=True)
    rows, mask, advantages = torch.tensor([0, 0, 1, 1]), torch.ones(4), torch.tensor([1.0, -1.0])
    options = {"positive": (2.0, 3.0), "negative": (3.0, 2.0)}
    assert not grpo.vespo_weights(logps, None, advantages, mask, rows, **options).requires_grad
    assert not grpo.off_policy_mask(logps, logps, advantages, mask, rows, 0.1).requires_grad
