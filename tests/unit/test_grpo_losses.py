"""GRPO's whole objective against a second writing of its formulas: scalars and loops, in float64, with its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives.advantages import decoupled_advantages, group_advantages
from slipstream.records import Completion, MicroBatch, Prompt, Rollout, StepTotals
from slipstream.trainers.metrics import Tally

LONGEST = 11
OPTIONS = [
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "beta": 0.3},
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "dapo", "delta": 1.1, "epsilon_high": 0.28},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "luspo", "beta": 0.2},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "beta": 0.1},
    {"loss_type": "vespo"},
    {"loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
    {"loss_type": "dapo", "use_vllm": True},
    {"loss_type": "grpo", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask", "beta": 0.1},
    {"loss_type": "dapo", "off_policy_mask_threshold": 0.1},
    {"loss_type": "dapo", "use_vllm": True, "off_policy_mask_threshold": 0.1},
    {"loss_type": "dapo", "top_entropy_quantile": 0.5, "beta": 0.1},
    {"loss_type": "grpo", "entropy_coef": 0.3},
    {"loss_type": "dapo", "entropy_coef": 0.3, "top_entropy_quantile": 0.5},
]


def trainer(options):
    """A trainer's objective without its model and engine."""
    made = GRPOTrainer.__new__(GRPOTrainer)
    made.args = GRPOConfig(output_dir="unused", report_to=[], max_completion_length=LONGEST, **options)
    made.entropy_coef, made.last_entropy, made.router_coef = made.args.entropy_coef, math.inf, 0.0
    return made


class Rows:
    """Random rows: their log-probabilities under everybody, entropies, masks and advantages, as nested lists."""

    def __init__(self, lengths, seed, options):
        self.lengths, generator = lengths, torch.Generator().manual_seed(seed)

        def values(scale, shift=0.0):
            return [
                (torch.randn(n, generator=generator, dtype=torch.float64) * scale + shift).tolist() for n in lengths
            ]

        self.logps = values(0.4, -1.5)
        self.old = [
            [v + 0.3 * d for v, d in zip(a, b, strict=True)] for a, b in zip(self.logps, values(1), strict=True)
        ]
        self.sampler = [
            [v + 0.1 * d for v, d in zip(a, b, strict=True)] for a, b in zip(self.old, values(1), strict=True)
        ]
        self.ref = values(0.4, -1.5)
        self.entropies = [[abs(v) for v in row] for row in values(1.0)]
        self.kept = [[float(v > 0.6) for v in row] for row in self.entropies]
        self.advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64).tolist()
        self.in_loss = [(seed + i) % 4 > 0 for i in range(len(lengths))]
        self.uses_sampler = options.get("use_vllm", False)
        self.uses_kept = options.get("top_entropy_quantile", 1.0) < 1

    def totals(self):
        tokens = sum(n for n, used in zip(self.lengths, self.in_loss, strict=True) if used)
        chosen = sum(sum(k) for k, used in zip(self.kept, self.in_loss, strict=True) if used)
        return StepTotals(
            len(self.lengths), max(tokens, 1.0), 1, max(chosen, 1.0) if self.uses_kept else max(tokens, 1.0)
        )

    def batch(self, rows):
        """The micro-batch of these rows, and its log-probabilities as a leaf."""
        flat = lambda v: torch.tensor([x for i in rows for x in v[i]], dtype=torch.float64)  # noqa: E731
        owner = torch.tensor([k for k, i in enumerate(rows) for _ in range(self.lengths[i])], dtype=torch.long)
        per_token = {"old_logps": flat(self.old), "ref_logps": flat(self.ref)}
        if self.uses_sampler:
            per_token["sampler_logps"] = flat(self.sampler)
        if self.uses_kept:
            per_token["entropy_mask"] = flat(self.kept)
        mask = torch.tensor([float(self.in_loss[i]) for i in rows for _ in range(self.lengths[i])], dtype=torch.float64)
        empty = torch.zeros(0, dtype=torch.long)
        rollouts = [
            Rollout(Prompt([1], {}, i), Completion([0] * self.lengths[i], None, 0, "stop"), "", False) for i in rows
        ]
        batch = MicroBatch(
            rollouts, empty, empty, empty, empty, owner, mask,
            torch.tensor([self.advantages[i] for i in rows], dtype=torch.float64), self.totals(), per_token,
        )  # fmt: skip
        logps = flat(self.logps).requires_grad_()
        return batch, PolicyOutput(logps, flat(self.entropies))


def naive(rows, args):
    """The loss of all rows, and the log-probabilities it is a function of, as scalars."""
    leaves = [[torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in row] for row in rows.logps]
    totals, total = rows.totals(), torch.tensor(0.0, dtype=torch.float64)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    for i, lp in enumerate(leaves):
        n, a, used = len(lp), rows.advantages[i], rows.in_loss[i]
        if not used or not n:
            continue
        d = [x - o for x, o in zip(lp, rows.old[i], strict=True)]
        w = d if args.importance_sampling_level == "token" else [sum(d) / n] * n
        c = [torch.exp(x) for x in w]
        rho = [1.0] * n
        if rows.uses_sampler:
            delta = [o - s for o, s in zip(rows.old[i], rows.sampler[i], strict=True)]
            ratio = [math.exp(x) for x in delta]
            if args.vllm_importance_sampling_mode.startswith("sequence"):
                ratio = [math.exp(sum(delta))] * n
            cap = args.vllm_importance_sampling_clip_max
            truncates = args.vllm_importance_sampling_mode.endswith("truncate")
            rho = [min(x, cap) if truncates else (x if x <= cap else 0.0) for x in ratio]
        if args.loss_type == "vespo":
            bound = lambda v: min(max(v, math.log(1e-8)), 20.0)  # noqa: E731
            logs = [bound(math.log(r)) if r > 0 else math.log(1e-8) for r in rho] if rows.uses_sampler else [0.0] * n
            log_w = bound(sum(min(max(float(x.detach()), -20), 20) for x in d) + sum(logs))
            k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
            phi = math.exp(lam + k * log_w - lam * math.exp(log_w))
        loss = []
        for t in range(n):
            if args.loss_type == "cispo":
                value = -min(float(c[t].detach()), args.epsilon_high) * a * lp[t]
            elif args.loss_type == "sapo":
                tau = args.sapo_temperature_pos if a > 0 else args.sapo_temperature_neg
                value = -(4 / tau) * torch.sigmoid(tau * (c[t] - 1)) * a
            elif args.loss_type == "vespo":
                value = -phi * a * lp[t]
            else:
                bounded = c[t] if args.delta is None else torch.clamp(c[t], max=args.delta)
                value = -torch.minimum(bounded * a, torch.clamp(c[t], 1 - args.epsilon, 1 + high) * a)
            if args.off_policy_mask_threshold is not None and a < 0:
                sampled = rows.sampler[i] if rows.uses_sampler else rows.old[i]
                drift = sum(s - float(x.detach()) for s, x in zip(sampled, lp, strict=True)) / n
                value = value * float(drift <= args.off_policy_mask_threshold)
            if rows.uses_kept:
                value = value * rows.kept[i][t]
            if args.loss_type != "vespo":
                value = value * rho[t]
            if args.beta:
                q = rows.ref[i][t] - lp[t]
                kl = torch.exp(q) - q - 1
                value = value + args.beta * (kl * c[t] if args.use_bias_correction_kl else kl)
            loss.append(value)
        if args.loss_type in ("grpo", "sapo"):
            total = total + sum(loss) / n / totals.rows
        elif args.loss_type == "luspo":
            total = total + sum(loss) / totals.rows
        elif args.loss_type == "dr_grpo":
            total = total + sum(loss) / (totals.rows * LONGEST)
        else:
            total = total + sum(loss) / totals.tokens
        kept = rows.kept[i] if rows.uses_kept else [1.0] * n
        entropy = sum(e * k for e, k in zip(rows.entropies[i], kept, strict=True))
        total = total - args.entropy_coef * entropy / totals.chosen_tokens
    return total, [x for row in leaves for x in row]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 10_000))
def test_loss_and_gradient_are_those_of_the_formulas(options, lengths, seed):
    made, rows = trainer(options), Rows(lengths, seed, options)
    batch, output = rows.batch(range(len(lengths)))
    loss = made.objective(output, batch, Tally())
    expected, leaves = naive(rows, made.args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    gradient = torch.autograd.grad(loss, output.logps_N, allow_unused=True)[0] if loss.requires_grad else None
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
        wanted = [0.0 if g is None else float(g) for g in wanted]
        assert gradient.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_parts_of_any_split_add_up(options):
    made, rows = trainer(options), Rows([4, 1, 6, 0, 3, 5], 7, options)

    def loss(parts):
        return sum(made.objective(output, batch, Tally()) for batch, output in map(rows.batch, parts)).item()

    whole = loss([range(6)])
    assert loss([[0, 1], [2], [3, 4, 5]]) == pytest.approx(whole, rel=1e-9)
    assert loss([[i] for i in range(6)]) == pytest.approx(whole, rel=1e-9)


def test_adaptive_entropy_moves_towards_its_target():
    made = trainer(
        {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 0.5, "entropy_coef_max": 0.02}
    )
    for entropy, coefficient in ((0.9, 0.005), (0.9, 0.0), (0.9, 0.0), (0.4, 0.005), (0.4, 0.01), (0.4, 0.015),
                                 (0.4, 0.02), (0.4, 0.02)):  # fmt: skip
        metrics = {"entropy/chosen": entropy}
        made.learned(metrics)
        assert metrics["entropy_coef"] == pytest.approx(coefficient)
        assert made.last_entropy == entropy


def test_an_adaptive_bonus_waits_for_a_measurement_below_the_target():
    options = {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_target": 0.3}
    rows = Rows([3, 4], 1, options)
    batch, output = rows.batch(range(2))
    plain = trainer({}).objective(output, batch, Tally()).item()
    made = trainer(options)
    assert made.objective(output, batch, Tally()).item() == pytest.approx(plain)
    made.last_entropy = 0.2
    assert made.objective(output, batch, Tally()).item() < plain


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
def test_advantage_scales_are_their_formulas(scale, groups, size, seed):
    rewards = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rewards[seed % len(rewards)] = torch.nan
    got = group_advantages(rewards, size, scale).tolist()
    scored = [r for r in rewards.tolist() if not math.isnan(r)]

    def std(values):
        mean = sum(values) / max(len(values), 1)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    for g in range(groups):
        group = rewards[g * size : (g + 1) * size].tolist()
        own = [r for r in group if not math.isnan(r)]
        divisor = {"group": std(own) + 1e-4, "batch": std(scored) + 1e-4, "none": 1.0}[scale]
        for i, r in enumerate(group):
            expected = 0.0 if math.isnan(r) else (r - sum(own) / len(own)) / divisor
            assert got[g * size + i] == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), st.integers(0, 1000))
def test_decoupled_advantages_are_their_formula(groups, size, functions, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(groups * size, functions, generator=generator, dtype=torch.float64)
    weights = torch.rand(functions, generator=generator, dtype=torch.float64)
    sums = torch.zeros(groups * size, dtype=torch.float64)
    for g in range(groups):
        part = rewards[g * size : (g + 1) * size]
        for f in range(functions):
            z = (part[:, f] - part[:, f].mean()) / (part[:, f].std() + 1e-4)
            sums[g * size : (g + 1) * size] += weights[f] * z
    expected = (sums - sums.mean()) / (sums.std() + 1e-4)
    assert torch.allclose(decoupled_advantages(rewards, weights, size), expected, atol=1e-9)


def test_decoupled_advantages_of_unscored_rows_are_zero():
    nan = torch.nan
    rewards = torch.tensor([[1.0, nan], [0.0, 2.0], [nan, nan], [3.0, 1.0]])
    advantages = decoupled_advantages(rewards, torch.ones(2), 2)
    assert advantages[2] == 0
    assert advantages.isfinite().all()
