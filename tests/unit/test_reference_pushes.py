"""When a trainer sends its reference to the engine: once, and again where the engine lacks it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from slipstream.generation.engine import SyncReport
from slipstream.trainers.generating import Generating


class Recorded:
    """An engine that only notes what it is sent."""

    def __init__(self):
        self.version, self.missing, self.sent = None, False, []

    def update_weights(self, version, tensors):
        self.version = version
        self.sent.append("policy")
        return SyncReport(version, 0, 0, 0.0, reference_missing=self.missing)

    def update_reference(self, tensors):
        self.sent.append("reference")


@pytest.fixture
def trainer():
    model = torch.nn.Linear(2, 2)
    return SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model: model), model_wrapped=model, engine=Recorded(),
        state=SimpleNamespace(global_step=0), args=SimpleNamespace(samples_from_reference=True),
        clock=SimpleNamespace(phase=lambda name: contextlib.nullcontext()), metrics=SimpleNamespace(add=lambda m: None),
        _pushed=None, _reference_pushed=False, _reference_model=lambda: contextlib.nullcontext(model),
    )  # fmt: skip


def sent_at(trainer, step):
    trainer.state.global_step, trainer.engine.sent = step, []
    Generating.push_weights(trainer)
    Generating.push_reference(trainer)
    return trainer.engine.sent


def test_the_reference_is_sent_again_to_an_engine_that_lacks_it(trainer):
    assert sent_at(trainer, 0) == ["policy", "reference"]
    assert sent_at(trainer, 1) == ["policy"]
    trainer.engine.missing = True  # a replica was started again, and holds nothing
    assert sent_at(trainer, 2) == ["policy", "reference"]
    trainer.engine.missing = False
    assert sent_at(trainer, 3) == ["policy"]
    trainer.engine.version = None  # the engine itself was
    assert sent_at(trainer, 3) == ["policy", "reference"]
