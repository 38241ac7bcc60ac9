"""Plans and checks against a small engine that loads as real ones do: fused, padded, transposed, computed."""

from __future__ import annotations

import pytest
import torch

from slipstream.weights.plan import View, WeightUpdateError, make_plan, signature_of
from slipstream.weights.verify import Expectation, Probe, check_finite, checksum

CHECKPOINT = {
    "q": torch.randn(4, 6),
    "k": torch.randn(2, 6),
    "up": torch.randn(6, 3),
    "embed": torch.randn(10, 6),
    "scale": torch.randn(1),
    "norm": torch.randn(6),
}


class Engine:
    """Parameters as an engine arranges them, and the loading that fills them."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        made = {"qk": (6, 6), "up": (3, 6), "embed": (16, 6), "scale": (1,), "norm": (6,)}
        self.parameters = {name: torch.full(shape, -7.0, dtype=dtype, device=device) for name, shape in made.items()}

    def load(self, tensors):
        p = self.parameters
        for name, tensor in tensors:
            if name == "q":
                p["qk"].narrow(0, 0, 4).copy_(tensor)
            elif name == "k":
                p["qk"].narrow(0, 4, 2).copy_(tensor)
            elif name == "up":
                p["up"].copy_(tensor.t())
            elif name == "embed":
                p["embed"][:10].copy_(tensor)
                p["embed"][10:].fill_(0)
            elif name == "scale":
                p["scale"].fill_(tensor.item())
            elif name == "norm":
                p["norm"].copy_(tensor + 1)
            else:
                raise KeyError(name)


def plan_for(tensors):
    blank = Engine(device="meta")
    return make_plan(blank.parameters, blank.load, list(tensors.items()))


def test_a_rehearsal_finds_where_every_tensor_goes_and_touches_nothing():
    engine = Engine()
    plan = make_plan(engine.parameters, engine.load, list(CHECKPOINT.items()))
    assert all(bool((parameter == -7).all()) for parameter in engine.parameters.values())
    assert plan.signature == signature_of(list(CHECKPOINT.items()))
    found = {region.source: region for region in plan.regions if region.source}
    assert set(found) == {"q", "k", "up", "embed"}
    assert found["k"].target == View((2, 6), (6, 1), 24)
    assert found["up"].origin == View((3, 6), (1, 3), 0)
    assert sorted(r.parameter for r in plan.regions if r.source is None) == ["norm", "scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, r"incomplete \(a part of a fused module was not sent\): qk \(24 of 36 values\)"),
        ({"up": None, "scale": None}, "missing: up, scale"),
        ({"other": torch.zeros(2)}, r"cannot take 'other' of shape \(2,\) \(KeyError"),
        ({"embed": torch.zeros(9, 6)}, r"cannot take 'embed' of shape \(9, 6\)"),
        ({"q": torch.zeros(3, 6)}, r"cannot take 'q' of shape \(3, 6\)"),
    ],
)
def test_incomplete_updates_are_refused(change, message):
    tensors = {name: tensor for name, tensor in (CHECKPOINT | change).items() if tensor is not None}
    with pytest.raises(WeightUpdateError, match=message):
        plan_for(tensors)


def test_all_that_does_not_fit_is_in_one_error():
    wrong = CHECKPOINT | {"up": torch.zeros(3, 6), "q": torch.zeros(3, 6), "other": torch.zeros(2)}
    del wrong["scale"]
    engine = Engine(device="meta")
    with pytest.raises(WeightUpdateError) as caught:
        make_plan(engine.parameters, engine.load, [*wrong.items(), ("norm", wrong["norm"])])
    first, rest = str(caught.value).split("it cannot take ")
    assert first == "weight update refused, the engine is unchanged: sent twice: norm; "
    names, _, coverage = rest.partition("); ")
    for told in ("'q' of shape (3, 6)", "'up' of shape (3, 6)", "'other' of shape (2,) (KeyError: 'other'"):
        assert told in names
    assert coverage == (
        "missing: scale; incomplete (a part of a fused module was not sent or not taken): qk (12 of 36 values)"
    )


def test_an_endless_list_of_what_does_not_fit_ends():
    tensors = CHECKPOINT | {f"other{i}": torch.zeros(2) for i in range(40)}
    with pytest.raises(WeightUpdateError, match=r"'other15' of shape \(2,\)") as caught:
        plan_for(tensors)
    assert "'other16'" not in str(caught.value)
    assert str(caught.value).endswith("and perhaps others: the first 16 are named")


def test_loading_that_fails_in_the_end_is_one_tensors_fault_at_most():
    engine = Engine(device="meta")

    def failing(tensors):
        engine.load(tensors)
        raise RuntimeError("too late")

    with pytest.raises(WeightUpdateError, match=r"cannot take 'norm' of shape \(6,\) \(RuntimeError: too late\)$"):
        make_plan(engine.parameters, failing, list(CHECKPOINT.items()))


def test_tensors_without_a_place_and_places_with_two_tensors_are_refused():
    engine = Engine(device="meta")

    def careless(tensors):
        tensors = dict(tensors)
        engine.load((n, t) for n, t in tensors.items() if n not in ("lm_head", "again"))
        engine.parameters["up"].copy_(tensors["again"])

    sent = [*CHECKPOINT.items(), ("lm_head", torch.zeros(2)), ("again", torch.zeros(3, 6))]
    with pytest.raises(WeightUpdateError, match=r"filled twice: up; unexpected .*: lm_head"):
        make_plan(engine.parameters, careless, sent)
    with pytest.raises(WeightUpdateError, match="sent twice: q"):
        make_plan(engine.parameters, engine.load, [*CHECKPOINT.items(), ("q", CHECKPOINT["q"])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_an_engine_holds_is_compared_bit_by_bit(dtype):
    plan = plan_for(CHECKPOINT)
    engine = Engine(dtype)
    expectation = Expectation(plan, list(CHECKPOINT.items()), engine.parameters, [])
    assert expectation.unverified == ["norm", "scale"]
    with pytest.raises(WeightUpdateError, match=r"q \(in qk\), k \(in qk\), up \(in up\), embed \(in embed\)"):
        expectation.check(engine.parameters)
    engine.load(CHECKPOINT.items())
    expectation.check(engine.parameters)
    bits = engine.parameters["qk"].view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[5, 2] ^= 1
    with pytest.raises(WeightUpdateError, match=r"differs from what was sent: k \(in qk\)$"):
        expectation.check(engine.parameters)
    bits[5, 2] ^= 1
    bits[[0, 1]] = bits[[1, 0]]
    with pytest.raises(WeightUpdateError, match=r"q \(in qk\)$"):
        expectation.check(engine.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_copies_are_asked_what_they_compute(dtype):
    packed = {"weight": torch.zeros(6, 6, dtype=dtype)}
    probe = Probe("layer", "qk", lambda rows: rows @ packed["weight"].t(), dtype)
    engine = Engine(dtype)
    engine.parameters["qk"] = torch.empty(0, dtype=dtype)  # emptied when it was packed
    expectation = Expectation(plan_for(CHECKPOINT), list(CHECKPOINT.items()), engine.parameters, [probe])
    engine.parameters["qk"] = torch.empty(6, 6, dtype=dtype)
    engine.load(CHECKPOINT.items())
    packed["weight"] = engine.parameters["qk"].clone()
    engine.parameters["qk"] = torch.empty(0, dtype=dtype)
    expectation.check(engine.parameters)
    packed["weight"][5, 5] *= 1.01
    with pytest.raises(WeightUpdateError, match=r"layer \(packed copy\)"):
        expectation.check(engine.parameters)


def test_values_that_are_not_finite_are_named():
    good = torch.full((3,), 60000.0, dtype=torch.float16)  # the sum of magnitudes does not fit into float16
    check_finite([("good", good)])
    bad = [("nan", float("nan")), ("inf", float("inf")), ("minus", -float("inf"))]
    with pytest.raises(WeightUpdateError, match=r"not finite .* in nan, inf, minus"):
        check_finite([("good", good), *((name, torch.tensor([1.0, value])) for name, value in bad)])
    engine = Engine(torch.float16)
    large = CHECKPOINT | {"embed": CHECKPOINT["embed"] + 1e5}
    with pytest.raises(WeightUpdateError, match=r"not finite .* in embed"):
        Expectation(plan_for(large), list(large.items()), engine.parameters, [])


def test_checksums_see_values_and_rows_whatever_the_layout():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((5,), (4, 7), (4, 8), (2, 3, 5), (0, 4)):
            tensor = torch.randn(shape).to(dtype)
            spread = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
            spread.copy_(tensor)
            assert checksum(tensor) == checksum(spread)
            if tensor.numel():
                assert checksum(tensor) != checksum(tensor.flip(0))
                assert checksum(tensor) != checksum(-tensor)
