"""An update as copies, against a small engine that loads as real ones do: fused, transposed, padded."""

from __future__ import annotations

import pytest
import torch
from interpreted import check, needs_triton

from slipstream.weights import direct
from slipstream.weights.direct import Copies, obstacle
from slipstream.weights.plan import WeightUpdateError, make_plan

SHAPES = {"q": (4, 6), "k": (2, 6), "up": (6, 3), "embed": (10, 6), "norm": (6,)}


def checkpoint(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


class Engine:
    """Parameters as an engine arranges them, and the loading that fills them."""

    def __init__(self, dtype=torch.float32, device="cpu", pad=0.0, offset=0.0):
        made = {"qk": (6, 6), "up": (3, 6), "embed": (16, 6), "norm": (6,)}
        self.parameters = {name: torch.full(shape, -7.0, dtype=dtype, device=device) for name, shape in made.items()}
        self.pad, self.offset = pad, offset

    def load(self, tensors):
        p = self.parameters
        for name, tensor in tensors:
            if name in ("q", "k"):
                p["qk"].narrow(0, *((0, 4) if name == "q" else (4, 2))).copy_(tensor)
            elif name == "up":
                p["up"].copy_(tensor.t())  # a strided part of what is sent
            elif name == "embed":
                p["embed"][:10].copy_(tensor)
                p["embed"][10:].fill_(self.pad)
            else:
                p["norm"].copy_(tensor + self.offset if self.offset else tensor)


def plan_of(**options):
    blank = Engine(device="meta", **options)
    return make_plan(blank.parameters, blank.load, list(checkpoint().items()))


def made(dtype=torch.float32):
    engine, plan = Engine(dtype), plan_of()
    assert obstacle(plan, engine.parameters) is None
    return engine, Copies(plan, engine.parameters)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
def test_copies_leave_what_loading_does(held, sent):
    engine, copies = made(held)
    naive = Engine(held)
    for seed in (0, 1):
        tensors = list(checkpoint(seed, sent).items())
        naive.load(tensors)
        seen = copies.look_at(tensors)
        assert copies.differing(seen)
        copies.check(seen)
        copies.copy(seen)
        assert copies.differing(seen) == []
        for name, parameter in engine.parameters.items():
            assert torch.equal(parameter, naive.parameters[name]), name


@pytest.mark.parametrize(
    ("parameter", "index", "told"),
    [("qk", 5, "q (in qk)"), ("qk", 30, "k (in qk)"), ("up", 17, "up"), ("embed", 59, "embed"), ("norm", 0, "norm")],
)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_is_found(held, parameter, index, told):
    engine, copies = made(held)
    seen = copies.look_at(list(checkpoint().items()))
    copies.copy(seen)
    bits = torch.int32 if held == torch.float32 else torch.int16
    engine.parameters[parameter].view(bits).view(-1)[index] ^= 1
    assert copies.differing(seen) == [told]


def test_padding_that_is_not_zero_is_found():
    engine, copies = made()
    seen = copies.look_at(list(checkpoint().items()))
    copies.copy(seen)
    engine.parameters["embed"][12, 3] = 1e-30
    assert copies.differing(seen) == ["zeros that pad embed"]


def test_zero_and_minus_zero_differ():
    engine, copies = made()
    tensors = {**checkpoint(), "norm": torch.zeros(6)}
    seen = copies.look_at(list(tensors.items()))
    copies.copy(seen)
    engine.parameters["norm"][2] = -0.0
    assert copies.differing(seen) == ["norm"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_values_that_are_not_finite_are_refused_before_anything_is_touched(value):
    engine, copies = made(torch.float16)
    tensors = checkpoint()
    tensors["k"][1, 2] = value  # 100000 is infinite in float16 only
    sent = list(tensors.items())
    with pytest.raises(WeightUpdateError, match=r"the engine is unchanged: .*not finite.* k\b"):
        copies.check(copies.look_at(sent))
    assert all(bool((parameter == -7).all()) for parameter in engine.parameters.values())


def test_what_is_more_than_a_copy_is_an_obstacle():
    engine = Engine()
    assert obstacle(plan_of(offset=1.0), engine.parameters) == "norm is computed from what is sent"
    assert obstacle(plan_of(pad=1.0), engine.parameters) == "embed is not filled exactly once"
    turned = {**engine.parameters, "up": engine.parameters["up"].t().contiguous().t()}
    assert obstacle(plan_of(), turned) == "up has another layout than while it is loaded"
    integers = {**engine.parameters, "norm": engine.parameters["norm"].int()}
    assert obstacle(plan_of(), integers) == "norm is torch.int32"


def test_tensors_that_cannot_be_read_in_place_are_not_copied():
    _, copies = made()
    for name, tensor in [
        ("q", torch.randn(6, 4).t()),
        ("norm", torch.zeros(6, dtype=torch.float64)),
        ("norm", torch.zeros(6, device="meta")),
    ]:
        assert copies.look_at(list({**checkpoint(), name: tensor}.items())) is None


def test_copies_fit_their_own_plan_and_memory_only():
    engine, copies = made()
    assert copies.fit(copies.plan, engine.parameters)
    assert not copies.fit(plan_of(), engine.parameters)
    moved = {**engine.parameters, "norm": engine.parameters["norm"].clone()}
    assert not copies.fit(copies.plan, moved)


KERNEL = """
import torch
from slipstream.weights import kernels
kernels.PIECE, kernels._BLOCK = 64, 16
for held in (torch.float32, torch.bfloat16, torch.float16):
    for sent in (torch.float32, torch.bfloat16):
        # The interpreter, unlike a GPU, cuts float32 off to bfloat16 and takes its subnormal numbers for zeros.
        sources = [torch.randn(n).bfloat16().to(sent) for n in (1, 15, 16, 64, 200, 333)]
        sources[4][:3] = torch.tensor([1e-37, -0.0, 3e-8]).bfloat16()
        for spoiled, at in ((None, 0), (0, 0), (3, 63), (4, 199), (5, 130)):
            targets = [source.to(held, copy=True) for source in sources]
            if spoiled is not None:
                targets[spoiled].view(torch.int32 if held.itemsize == 4 else torch.int16)[at] ^= 1
            flags = torch.zeros(len(sources) + 1, dtype=torch.int32)
            table = kernels.table_of(
                [(i + 1, t, s) for i, (t, s) in enumerate(zip(targets, sources))], torch.device("cpu"))
            assert table.shape == (4, 1 + 1 + 1 + 1 + 4 + 6), table.shape
            kernels.mark_unlike(table, flags, held, sent, aligned=False)
            found = flags.nonzero()[:, 0].tolist()
            assert found == ([] if spoiled is None else [spoiled + 1]), (held, sent, spoiled, found)
            kernels.copy(table, held, sent, aligned=False)
            bits = [(t.view(torch.int8), s.to(held).view(torch.int8)) for t, s in zip(targets, sources)]
            assert all(torch.equal(*pair) for pair in bits), (held, sent, spoiled)
        for at, value in ((None, 0), (0, "nan"), (2, "inf"), (5, "-inf"), (4, 1e5)):
            given = [source.clone() for source in sources]
            if at is not None:
                given[at][-1] = float(value)
            flags = torch.zeros(len(given), dtype=torch.int32)
            table = kernels.table_of([(i, s, s) for i, s in enumerate(given)], torch.device("cpu"))
            kernels.mark_not_finite(table, flags, held, sent, aligned=False)
            wanted = [i for i, s in enumerate(given) if not s.to(held).isfinite().all()]
            assert flags.nonzero()[:, 0].tolist() == wanted, (held, sent, at)
print("all equal")
"""


@needs_triton
def test_kernels_do_what_pytorch_does():
    check(KERNEL)


def test_without_a_kernel_pytorch_compares(monkeypatch):
    monkeypatch.setattr(direct, "has_kernel", lambda: False)
    _, copies = made(torch.bfloat16)
    assert len(copies.differing(copies.look_at(list(checkpoint().items())))) == len(SHAPES) + 1
