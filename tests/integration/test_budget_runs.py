"""Trainers that measure their budget of tokens, by a made-up meter: as if it had been given."""

from __future__ import annotations

import functools
import random

import numpy
import pytest
import resumable
import rounds
import torch

from slipstream.modeling import budget
from slipstream.trainers import learning


class Meter:
    """Says that a token takes about 200 bytes of 5000; measuring draws random numbers, as kernels' tuning may."""

    def __init__(self):
        self.measured = 0

    def free(self):
        return 5000 * 5 // 4

    def peak(self, step):
        step()
        self.measured += 1
        random.random()
        numpy.random.rand()
        torch.rand(1)
        return 10_000 * self.measured


def measuring(trainer, meter):
    trainer._find_budget = functools.partial(trainer._find_budget, meter=meter)
    return trainer


@pytest.fixture
def meter(monkeypatch):
    monkeypatch.setattr(budget, "MULTIPLE", 1)
    monkeypatch.setattr(learning, "optimizer_promise", lambda *_: 0)
    return Meter()


def test_a_run_that_measures_is_the_run_with_that_budget(tiny_model, tmp_path, meter, capsys):
    options = {"adapter": True, "packing": True, "max_steps": 3, "save_strategy": "no", "gradient_checkpointing": True}
    measured = measuring(resumable.make(str(tiny_model), tmp_path / "measured", **options), meter)
    measured.model.zero_grad()
    measured.train()
    assert meter.measured == 2
    found = measured.packer.max_tokens
    assert 16 < found < 16 * 16  # more than a row, less than a step
    assert capsys.readouterr().out.count(f"max_tokens_per_micro_batch {found} (measured: ") == 1
    told = resumable.make(str(tiny_model), tmp_path / "told", max_tokens_per_micro_batch=found, **options)
    told.train()
    assert torch.equal(rounds.weights(measured.model), rounds.weights(told.model))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (measured, told)]
    assert losses[0] == losses[1]


def test_a_resumed_run_keeps_the_budget_and_says_so(tiny_model, tmp_path, meter, capsys):
    options = {"packing": True, "max_steps": 2, "save_steps": 1}
    first = measuring(resumable.make(str(tiny_model), tmp_path, **options), meter)
    first.train()
    capsys.readouterr()
    again = measuring(resumable.make(str(tiny_model), tmp_path, **options), meter)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.packer.max_tokens == first.packer.max_tokens
    assert meter.measured == 2
    assert f"max_tokens_per_micro_batch {first.packer.max_tokens} (as when the run began)" in capsys.readouterr().out
    assert torch.equal(rounds.weights(again.model), rounds.weights(first.model))
    told = measuring(resumable.make(str(tiny_model), tmp_path, **options, max_tokens_per_micro_batch=999), meter)
    told.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert told.packer.max_tokens == 999


@pytest.mark.parametrize("name", rounds.ALL)
def test_every_trainer_can_measure(tiny_model, tmp_path, meter, name):
    trainer = measuring(rounds.make(name, str(tiny_model), tmp_path, packing=True, beta=0.1), meter)
    trainer.train()
    assert meter.measured == 2
    assert trainer.packer.max_tokens


def test_nothing_is_measured_on_a_cpu_or_without_packing(tiny_model, tmp_path, meter):
    packed = rounds.make("RLOO", str(tiny_model), tmp_path, packing=True, max_steps=1)
    padded = measuring(rounds.make("RLOO", str(tiny_model), tmp_path, max_steps=1, packing=False), meter)
    given = measuring(
        rounds.make("RLOO", str(tiny_model), tmp_path, packing=True, max_steps=1, max_tokens_per_micro_batch=50), meter
    )
    for trainer, expected in ((packed, None), (padded, None), (given, 50)):
        trainer.train()
        assert trainer.packer.max_tokens == expected
    assert not meter.measured
