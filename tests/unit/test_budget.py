"""The budget of tokens that is measured: what follows from two peaks, and that measuring leaves no trace."""

from __future__ import annotations

import pytest
import torch

from slipstream.modeling.budget import gradients_aside, measured_budget, optimizer_promise
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, Prompt, Rollout

KIB = 1 << 10


class Device:
    """A device on which a pass takes `fixed` bytes and `slope` bytes a token, and its meter."""

    def __init__(self, slope=10 * KIB, fixed=1000 * KIB, free=1 << 30, room=10**9):
        self.slope, self.fixed, self.available, self.room = slope, fixed, free, room
        self.ran = []

    def run(self, tokens):
        self.ran.append(tokens)
        if tokens > self.room:
            raise torch.OutOfMemoryError("no room")
        return tokens

    def free(self):
        return self.available

    def peak(self, step):
        step()
        return self.fixed + self.slope * self.ran[-1]

    def budget(self, least=100, most=10**9, agree=int, **options):
        return measured_budget(self.run, self, least=least, most=most, agree=agree, **options)


def test_the_budget_is_where_the_line_reaches_four_fifths_of_the_memory():
    device = Device()
    found = device.budget()
    exact = (0.8 * device.available - device.fixed) / device.slope
    assert found.tokens % 256 == 0
    assert exact - 256 < found.tokens <= exact
    assert (found.bytes_per_token, found.fixed, found.free) == (device.slope, device.fixed, device.available)
    # Each size runs once before it counts.
    assert device.ran == [8192, 8192, 16384, 16384]
    assert str(found) == f"max_tokens_per_micro_batch {found.tokens} (measured: 0.01 MiB a token, 1.0 GiB free)"


def test_memory_that_the_optimizer_will_take_is_not_free():
    half = Device().budget(promised=1 << 29)
    assert half.free == 1 << 29
    assert half.tokens == Device(free=1 << 29).budget().tokens


def test_it_holds_the_longest_unit_and_no_more_than_a_step():
    assert Device(free=0).budget(least=700).tokens == 768
    assert Device(free=0).budget(promised=99, least=256).tokens == 256
    device = Device()
    assert device.budget(most=3000).tokens == 3072
    assert max(device.ran) == 3000


def test_the_smallest_budget_of_all_ranks_counts_and_their_longest_rows():
    devices = [Device(free=1 << 30), Device(free=1 << 28)]
    asked = []
    for device in devices:
        device.budget(agree=lambda n, own=asked: own.append(n) or n)
    # Two ranks ask three times each: the longest unit, the longest step, the budget.
    largest = [max(pair) for pair in zip(asked[:3], asked[3:], strict=True)]
    for device in devices:
        answers = iter(largest)
        found = device.budget(agree=lambda n, answers=answers: next(answers))
        assert found.tokens == Device(free=1 << 28).budget().tokens


def test_trials_shrink_until_they_fit():
    device = Device(room=5000)
    found = device.budget()
    assert found.bytes_per_token == device.slope
    assert device.ran[-4:] == [2048, 2048, 4096, 4096]
    with pytest.raises(torch.OutOfMemoryError):
        Device(room=100).budget()


def test_a_peak_that_does_not_grow_is_put_down_to_the_tokens():
    device = Device(slope=0, fixed=1 << 20)
    found = device.budget()
    assert found.bytes_per_token == (1 << 20) / 16384
    assert found.fixed == 0
    longer_than_both = Device()
    longer_than_both.run = lambda tokens: longer_than_both.ran.append(20000) or 20000
    assert longer_than_both.budget(least=20000).bytes_per_token == pytest.approx(device_bytes(longer_than_both))


def device_bytes(device):
    return (device.fixed + device.slope * 20000) / 20000


def test_trial_rows_have_the_size_that_is_asked_for():
    packer = Packer(2, 0, torch.device("cpu"), packed=True, share_prompts=True)
    prompts = [Prompt(list(range(30)), {}, 0), Prompt(list(range(5)), {}, 1)]
    rollouts = [Rollout(p, Completion([1] * 10, None, 0, "stop"), "", False) for p in prompts for _ in range(4)]
    for tokens in (50, 400, 1000):
        batch = packer.trial(rollouts, tokens, group_size=2)
        assert tokens - 50 <= batch.input_ids_BT.numel() <= tokens
        assert len(batch.rollouts) % 2 == 0
    assert packer.trial(rollouts, 1, group_size=2).rollouts == rollouts[:2]


def test_gradients_come_back():
    model = torch.nn.Linear(2, 2)
    kept = model.weight.grad = torch.ones(2, 2)
    with gradients_aside(model):
        assert model.weight.grad is None
        model(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match="shapes"), gradients_aside(model):
        model(torch.ones(3))
    assert model.weight.grad is kept
    assert model.bias.grad is None
    optimizer = torch.optim.AdamW(model.parameters())
    assert optimizer_promise(optimizer, model) == 2 * 6 * 4
    optimizer.step()
    assert optimizer_promise(optimizer, model) == 0
