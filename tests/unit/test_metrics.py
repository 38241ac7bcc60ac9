"""Collecting metrics over micro-batches, steps and phases."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from slipstream.records import Completion, Prompt, Rollout
from slipstream.trainers.grpo import GRPOTrainer
from slipstream.trainers.metrics import Clock, Metrics, Tally
from slipstream.trainers.rloo import RLOOTrainer


class OneRank:
    """What Tally needs of an accelerator, for one process."""

    @staticmethod
    def reduce(tensor, kind):
        return tensor

    @staticmethod
    def gather(tensor):
        return tensor


def test_means_are_weighted_over_micro_batches():
    tally = Tally()
    tally.mean("a", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    tally.mean("a", torch.tensor([4.0, 4.0, 4.0]))
    assert tally.reduce(OneRank()) == {"a": pytest.approx((1 + 12) / 4)}


def test_extremes_over_micro_batches():
    tally = Tally()
    for values in ([3.0, -1.0], [0.5], []):
        tally.max("high", torch.tensor(values))
        tally.min("low", torch.tensor(values))
    assert tally.reduce(OneRank()) == {"high": 3.0, "low": -1.0}


def test_extremes_leave_out_what_has_no_weight():
    tally = Tally()
    tally.max("high", torch.tensor([1.0, 9.0]), torch.tensor([2.0, 0.0]))
    tally.min("low", torch.tensor([1.0, -9.0]), torch.tensor([2.0, 0.0]))
    tally.min("none", torch.tensor([1.0]), torch.tensor([0.0]))
    assert tally.reduce(OneRank()) == {"high": 1.0, "low": 1.0}


def test_nothing_tallied_is_left_out():
    tally = Tally()
    tally.mean("a", torch.tensor([1.0]), torch.tensor([0.0]))
    tally.max("b", torch.tensor([]))
    assert tally.reduce(OneRank()) == {}


def test_metrics_average_what_is_a_number():
    metrics = Metrics()
    for value in (1.0, math.nan, 3.0):
        metrics.add({"a": value, "b": math.nan})
    assert metrics.flush() == {"a": 2.0, "b": None}
    assert metrics.flush() == {}


def test_an_inner_phase_is_taken_from_the_outer_one(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock.phase("outer"), clock.phase("inner"):
        pass
    assert clock.flush() == {"inner": 3.0, "outer": 6.0}
    assert clock.flush() == {}


class Ranks:
    """What `credit` needs of an accelerator, on rank `rank` of those that have `rewards`, the first `real` of each."""

    device = torch.device("cpu")

    def __init__(self, rewards, real, rank):
        self.process_index = rank
        self._rewards = torch.tensor([[value] for own in rewards for value in own])
        self._counts = torch.cat([torch.arange(len(own)) < n for own, n in zip(rewards, real, strict=True)])

    def gather(self, tensor):
        return self._counts if tensor.dtype == torch.bool else self._rewards


def credited(kind, rewards, real, **settings):
    """Advantages of the rows that count, and metrics."""
    advantages = []
    for rank, own in enumerate(rewards):
        trainer = kind.__new__(kind)
        trainer.args = SimpleNamespace(mask_truncated_completions=False, beta=0.0, reward_clip_range=None, **settings)
        trainer.accelerator, trainer.rewards = Ranks(rewards, real, rank), SimpleNamespace(names=["f"])
        trainer.reward_weights_F = torch.ones(1)
        rows = [Rollout(Prompt([1], {}, 0), Completion([2], None, 0, "stop"), "", False, [value]) for value in own]
        metrics = trainer.credit(rows, 2, real[rank])
        advantages += [row.advantage for row in rows[: real[rank]]]
    return advantages, metrics


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GRPOTrainer, {"scale_rewards": "batch", "multi_objective_aggregation": "sum_then_normalize"}),
        (GRPOTrainer, {"scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"}),
        (RLOOTrainer, {"normalize_advantages": True}),
    ],
)
def test_rows_that_fill_up_an_evaluation_change_nothing(kind, settings):
    rows = [1.0, 0.0, 5.0, 2.0, 0.0, 3.0]
    assert credited(kind, [rows[:4], [*rows[4:], *rows[:2]]], [4, 2], **settings) == credited(
        kind, [rows], [6], **settings
    )
