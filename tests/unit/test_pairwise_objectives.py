"""RLOO's and the pairwise objectives against a second, naive writing of their formulas: loops in float64, gradients
included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.objectives import pairwise, rloo
from slipstream.objectives.segments import row_sum

NAN = math.nan
F64 = torch.float64
row_lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


class Rows:
    """Random rows of a flat batch: log-probabilities under three policies, a mask, and a number a row."""

    def __init__(self, lengths: list[int], seed: int, scale: float = 0.4) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.lengths, total = lengths, sum(lengths)
        self.rows_N = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.long)
        self.logps_N = (torch.randn(total, generator=draw, dtype=F64) * scale - 1).requires_grad_()
        self.old_N = self.logps_N.detach() + torch.randn(total, generator=draw, dtype=F64) * 0.2
        self.ref_N = torch.randn(total, generator=draw, dtype=F64) * scale - 1
        self.mask_N = (torch.rand(total, generator=draw) < 0.8).to(F64)
        self.weights_N = torch.rand(total, generator=draw, dtype=F64) * 2
        self.values_B = torch.randn(len(lengths), generator=draw, dtype=F64)

    def tokens(self, row: int) -> list[int]:
        """Positions of a row's tokens that the mask keeps."""
        start = sum(self.lengths[:row])
        return [i for i in range(start, start + self.lengths[row]) if self.mask_N[i]]


def same_gradient(loss: torch.Tensor, by_hand: list[float], logps_N: torch.Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, logps_N)
    assert gradient.tolist() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


# RLOO ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000), st.floats(0, 0.7), st.booleans())
def test_leave_one_out_advantages_are_those_of_loops(groups, size, seed, missing, normalize):
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(groups * size, generator=draw, dtype=F64)
    rewards[torch.rand(groups * size, generator=draw) < missing] = NAN
    got = rloo.leave_one_out_advantages(rewards, size, normalize).tolist()
    expected: list[float | None] = []
    for i, reward in enumerate(rewards.tolist()):
        group = range(i // size * size, (i // size + 1) * size)
        others = [rewards[j].item() for j in group if j != i and not rewards[j].isnan()]
        expected.append(None if math.isnan(reward) or not others else reward - sum(others) / len(others))
    known = [a for a in expected if a is not None]
    if normalize and known:
        mean = sum(known) / len(known)
        std = math.sqrt(sum((a - mean) ** 2 for a in known) / (len(known) - 1)) if len(known) > 1 else 0.0
        expected = [None if a is None else (a - mean) / (std + 1e-4) for a in expected]
    assert got == pytest.approx([0.0 if a is None else a for a in expected], rel=1e-9, abs=1e-9)


def test_leave_one_out_worked_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, NAN, 5.0, NAN, NAN, NAN])
    advantages = rloo.leave_one_out_advantages(rewards, 4)
    assert advantages.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0, 0, 0]


def test_rewards_are_clipped_before_the_penalty():
    rewards, kl = torch.tensor([-9.0, 0.5, 9.0, NAN]), torch.tensor([1.0, -2.0, 4.0, 1.0])
    shaped = rloo.shaped_rewards(rewards, kl, 0.5, (-1.0, 2.0))
    assert shaped[:3].tolist() == [-1.5, 1.5, 0.0]
    assert shaped[3].isnan()
    unclipped = rloo.shaped_rewards(rewards[:3], None, 0.0)
    assert unclipped.tolist() == [-9.0, 0.5, 9.0]


@pytest.mark.parametrize("corrected", [False, True])
@settings(deadline=None)
@given(row_lengths, st.integers(0, 10_000), st.floats(0.01, 0.5), st.floats(0.01, 0.9))
def test_sequence_surrogate_and_its_gradient_are_those_of_loops(corrected, lengths, seed, low, high):
    rows = Rows(lengths, seed)
    weights = rows.weights_N if corrected else None
    loss, at_low, at_high = rloo.sequence_surrogate(
        rows.logps_N - rows.old_N, rows.values_B, rows.mask_N, rows.rows_N, low, high, weights
    )
    by_hand = [0.0] * sum(lengths)
    for b, a in enumerate(rows.values_B.tolist()):
        tokens = rows.tokens(b)
        ratio = math.exp(sum((rows.logps_N[t] - rows.old_N[t]).item() for t in tokens))
        assert loss[b].item() == pytest.approx(-min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a))
        assert at_low[b] == (ratio < 1 - low and a < 0)
        assert at_high[b] == (ratio > 1 + high and a > 0)
        if not at_low[b] and not at_high[b]:
            for t in tokens:
                by_hand[t] = -ratio * a * (rows.weights_N[t].item() if corrected else 1.0)
    same_gradient(loss.sum(), by_hand, rows.logps_N)


def test_on_policy_the_gradient_is_reinforce():
    rows = Rows([3, 2], 1)
    loss, _, _ = rloo.sequence_surrogate(
        rows.logps_N - rows.logps_N.detach(), rows.values_B, torch.ones(5), rows.rows_N, 0.2, 0.2
    )
    same_gradient(loss.sum(), [-rows.values_B[b].item() for b in (0, 0, 0, 1, 1)], rows.logps_N)


def test_a_token_whose_weight_is_zero_has_no_gradient():
    rows = Rows([4], 3)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    loss, _, _ = rloo.sequence_surrogate(
        rows.logps_N - rows.logps_N.detach(), torch.ones(1), torch.ones(4), rows.rows_N, 0.2, 0.2, weights
    )
    same_gradient(loss.sum(), [-1, 0, -1, -1], rows.logps_N)


def test_huge_and_unknown_log_ratios_do_not_become_nan():
    log_ratio = torch.tensor([300.0, -300.0, NAN, 0.1], requires_grad=True)
    mask, rows = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 1, 2, 2])
    for advantages in ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]):
        loss, _, _ = rloo.sequence_surrogate(log_ratio, torch.tensor(advantages), mask, rows, 0.2, 0.2)
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


# Pairs --------------------------------------------------------------------------------------------------------------


def test_the_higher_score_is_chosen_and_of_equal_ones_the_first():
    choice = pairwise.choose(torch.tensor([1.0, 2.0, 3.0, NAN, 1.0]), torch.tensor([2.0, 1.0, 3.0, 1.0, NAN]))
    assert choice.first_P[:3].tolist() == [False, True, True]
    assert choice.judged_P.tolist() == [True, True, True, False, False]


def test_a_completion_without_an_end_loses_the_penalty():
    scores, truncated = torch.tensor([[1.0, 0.5], [NAN, 2.0]]), torch.tensor([[True, False], [False, True]])
    penalized = pairwise.penalize_missing_eos(scores, truncated, 1.5)
    assert penalized[0].tolist() == [-0.5, 0.5]
    assert penalized[1, 0].isnan()
    assert penalized[1, 1] == 0.5
    assert pairwise.penalize_missing_eos(scores, truncated, None) is scores


def test_probabilities_are_bradley_terrys():
    first, second = torch.tensor([0.0, 1.0, -2.0, NAN], dtype=F64), torch.tensor([0.0, -1.0, 1.0, 1.0], dtype=F64)
    got = pairwise.preference_probabilities(first, second)
    assert got[:3].tolist() == pytest.approx([1 / (1 + math.exp(-d)) for d in (0.0, 2.0, -3.0)])
    assert got[3].isnan()


@pytest.mark.parametrize("loss_type", pairwise.LOSS_TYPES)
@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_preference_loss_and_its_gradient_are_those_of_loops(loss_type, pairs, seed, beta):
    """From tokens on: row 2p is chosen, row 2p + 1 rejected."""
    draw = torch.Generator().manual_seed(seed)
    rows = Rows([int(n) for n in torch.randint(1, 6, (2 * pairs,), generator=draw)], seed, scale=1.5)
    sums = row_sum(rows.logps_N * rows.mask_N, rows.rows_N, 2 * pairs)
    refs = row_sum(rows.ref_N * rows.mask_N, rows.rows_N, 2 * pairs)
    margins = pairwise.margins(sums[0::2], sums[1::2], refs[0::2], refs[1::2])
    losses = pairwise.preference_loss(margins, beta, loss_type)
    by_hand = [0.0] * sum(rows.lengths)
    for p in range(pairs):
        chosen, rejected = rows.tokens(2 * p), rows.tokens(2 * p + 1)

        def above_reference(tokens: list[int]) -> float:
            return sum((rows.logps_N[t] - rows.ref_N[t]).item() for t in tokens)

        h = above_reference(chosen) - above_reference(rejected)
        if loss_type == "sigmoid":
            expected, slope = math.log1p(math.exp(-beta * h)), -beta / (1 + math.exp(beta * h))
        else:
            expected, slope = (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
        assert margins[p].item() == pytest.approx(h, abs=1e-9)
        assert losses[p].item() == pytest.approx(expected, rel=1e-9)
        for t in chosen:
            by_hand[t] = slope
        for t in rejected:
            by_hand[t] = -slope
    same_gradient(losses.sum(), by_hand, rows.logps_N)


def test_an_unknown_loss_type_is_named():
    with pytest.raises(ValueError, match="loss_type='hinge' is not one of 'sigmoid', 'ipo'"):
        pairwise.preference_loss(torch.zeros(1), 0.1, "hinge")


def test_far_margins_have_finite_losses():
    margins = torch.tensor([-1e5, 1e5], requires_grad=True)
    losses = pairwise.preference_loss(margins, 0.5, "sigmoid")
    assert losses.tolist() == [5e4, 0.0]
    assert torch.autograd.grad(losses.sum(), margins)[0].tolist() == [-0.5, 0.0]


def test_the_exploration_bonus_pushes_the_references_completions_down():
    rows = Rows([2, 3], 5)
    loss = pairwise.exploration_bonus(row_sum(rows.logps_N, rows.rows_N, 2), 1e-3)
    assert loss[1].item() == pytest.approx(1e-3 * rows.logps_N[2:].sum().item())
    same_gradient(loss.sum(), [1e-3] * 5, rows.logps_N)


@settings(deadline=None)
@given(row_lengths, st.integers(0, 10_000), st.floats(0, 2))
def test_nash_md_and_its_gradient_are_those_of_loops(lengths, seed, beta):
    rows = Rows(lengths, seed)
    probabilities = torch.sigmoid(rows.values_B)
    probabilities[seed % len(lengths)] = NAN
    loss = pairwise.nash_md_loss(rows.logps_N, rows.ref_N, probabilities, rows.mask_N, rows.rows_N, beta)
    by_hand = [0.0] * sum(lengths)
    for b, p in enumerate(probabilities.tolist()):
        if math.isnan(p):
            assert loss[b] == 0
            continue
        lp = [(t, rows.logps_N[t].item(), rows.ref_N[t].item()) for t in rows.tokens(b)]
        expected_kl, expected_score = sum((x - r) * x for _, x, r in lp), -(p - 0.5) * sum(x for _, x, _ in lp)
        assert loss[b].item() == pytest.approx(beta * expected_kl + expected_score, abs=1e-12)
        for t, x, r in lp:
            by_hand[t] = beta * (x - r) - (p - 0.5)
    same_gradient(loss.sum(), by_hand, rows.logps_N)


def test_nash_md_raises_what_wins_and_holds_to_the_reference():
    logps = torch.tensor([-1.0, -1.0], requires_grad=True)
    rows, ones = torch.tensor([0, 1]), torch.ones(2)
    win_and_lose, even = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    wins = pairwise.nash_md_loss(logps, logps.detach(), win_and_lose, ones, rows, 0.1)
    assert torch.autograd.grad(wins.sum(), logps)[0].tolist() == pytest.approx([-0.4, 0.4])
    away = pairwise.nash_md_loss(logps, torch.tensor([-2.0, -0.5]), even, ones, rows, 0.1)
    assert torch.autograd.grad(away.sum(), logps)[0].tolist() == pytest.approx([0.1, -0.05])


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 1000))
def test_the_parts_of_any_split_add_up_to_the_mean_of_what_was_judged(sizes, seed):
    """Parts are micro-batches of two ranks, whose gradients are averaged."""
    draw = torch.Generator().manual_seed(seed)
    losses = torch.randn(sum(sizes), generator=draw, dtype=F64)
    judged = torch.rand(sum(sizes), generator=draw) < 0.7
    losses[~judged] = NAN
    parts = [
        pairwise.step_mean(part, counts, int(judged.sum()), 2)
        for part, counts in zip(losses.split(sizes), judged.split(sizes), strict=True)
    ]
    kept = [v for v in losses.tolist() if not math.isnan(v)]
    assert sum(p.item() for p in parts) / 2 == pytest.approx(sum(kept) / len(kept) if kept else 0.0)


def test_what_is_not_judged_has_no_gradient():
    losses = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    mean = pairwise.step_mean(losses, torch.tensor([True, False, True]), 2, 1)
    assert torch.autograd.grad(mean, losses)[0].tolist() == [0.5, 0.0, 0.5]
