"""Collecting metrics over micro-batches, steps and phases."""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.trainers.metrics import Clock, Metrics, Tally


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
