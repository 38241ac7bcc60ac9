"""Plans and checks against a small engine that loads as real ones do: fused, padded, transposed, computed."""

from __future__ import annotations

import itertools

import pytest
import torch

from slipstream.weights.direct import Copies
from slipstream.weights.plan import WeightUpdateError, make_plan, signature_of
from slipstream.weights.recorder import View
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
    assert set(found) == {"q", "k", "up", "embed", "scale"}
    assert found["k"].target == View((2, 6), (6, 1), 24)
    assert found["up"].origin == View((3, 6), (1, 3), 0)
    assert [r.parameter for r in plan.regions if r.source is None] == ["norm"]


def test_a_number_that_is_computed_from_a_tensor_is_no_copy_of_it():
    def doubling(tensors):
        [(_, tensor)] = tensors
        parameters["scale"].fill_(2 * tensor.item())

    parameters = {"scale": torch.zeros(1)}
    plan = make_plan(parameters, doubling, [("scale", torch.ones(1))])
    assert [(region.parameter, region.source) for region in plan.regions] == [("scale", None)]
    plan = make_plan(parameters, doubling, [("scale", torch.ones(1, dtype=torch.uint8))])
    assert [(region.parameter, region.source) for region in plan.regions] == [("scale", None)]


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
    assert expectation.unverified == ["norm"]
    with pytest.raises(WeightUpdateError, match=r"q \(in qk\), k .*, embed \(in embed\), scale \(in scale\)"):
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


class Layers(torch.nn.Module):
    """An engine with buffers: `layer.scalar` and `limit` are loaded, `own.table` is not."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.layer, self.own = torch.nn.Module(), torch.nn.Module()
        self.layer.weight = torch.nn.Parameter(torch.full((2, 3), -7.0, device=device))
        for module, name, shape in ((self, "limit", ()), (self.layer, "scalar", (1,)), (self.own, "table", (3,))):
            module.register_buffer(name, torch.full(shape, -7.0, device=device))

    @torch.no_grad()
    def load(self, tensors):
        for name, tensor in tensors:
            if name.startswith("own."):
                raise KeyError(name)
            (self.get_parameter if name.endswith("weight") else self.get_buffer)(name).copy_(tensor)


LAYERS = {"layer.weight": torch.randn(2, 3), "layer.scalar": torch.randn(1), "limit": torch.tensor(float("inf"))}


def layers_plan(sent, **options):
    model = Layers("meta")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return make_plan(parameters, model.load, list(sent.items()), buffers, **options)


def held(model, plan):
    return {**dict(model.named_parameters()), **{name: model.get_buffer(name) for name in plan.buffers}}


def test_buffers_that_loading_fills_are_part_of_the_plan_and_compared():
    plan, model = layers_plan(LAYERS), Layers()
    assert sorted(plan.buffers) == ["layer.scalar", "limit"]
    assert plan.layouts.keys() == LAYERS.keys()
    expectation = Expectation(plan, list(LAYERS.items()), held(model, plan), [])
    assert expectation.unverified == []
    with pytest.raises(WeightUpdateError, match=r"what was sent: layer.weight .*, layer\.scalar .*, limit "):
        expectation.check(held(model, plan))
    model.load(LAYERS.items())
    expectation.check(held(model, plan))
    model.layer.scalar += 1
    with pytest.raises(WeightUpdateError, match=r"differs from what was sent: layer\.scalar \(in layer\.scalar\)$"):
        expectation.check(held(model, plan))


@pytest.mark.parametrize("lacking", ["layer.scalar", "limit"])
def test_a_buffer_that_loading_would_fill_is_missing_when_it_is_not_sent(lacking):
    sent = {name: tensor for name, tensor in LAYERS.items() if name != lacking}
    with pytest.raises(WeightUpdateError, match=f"the engine is unchanged: missing: {lacking}$"):
        layers_plan(sent)


def test_buffers_that_no_loading_fills_may_stay_unless_they_hold_noise():
    with pytest.raises(WeightUpdateError, match=r"the engine is unchanged: missing: own\.table$"):
        layers_plan(LAYERS, noise=True)
    with pytest.raises(WeightUpdateError, match=r"cannot take 'own\.table' of shape \(3,\)"):
        layers_plan(LAYERS | {"own.table": torch.zeros(3)})


def test_a_buffer_beside_loaded_weights_is_missing_whoever_fills_it():
    """vLLM's reload gives such a layer new memory, and would leave whatever lies there in what is not loaded."""
    model = Layers("meta")
    model.layer.register_buffer("beta", torch.zeros(1, device="meta"))

    def load(tensors):
        model.load((name, tensor) for name, tensor in tensors if name != "layer.beta")

    parts = dict(model.named_parameters()), load, list(LAYERS.items()), dict(model.named_buffers())
    with pytest.raises(WeightUpdateError, match=r"the engine is unchanged: missing: layer\.beta$"):
        make_plan(*parts)


def test_buffers_may_be_infinite_but_not_a_number():
    plan, model = layers_plan(LAYERS), Layers()
    assert plan.unbounded() == {"layer.scalar", "limit"}
    copies = Copies(plan, held(model, plan))
    for wrong in ({"limit": torch.tensor(float("nan"))}, {"layer.weight": torch.full((2, 3), float("inf"))}):
        sent = list((LAYERS | wrong).items())
        for check in (
            lambda sent=sent: Expectation(plan, sent, held(model, plan), []),
            lambda sent=sent: copies.check(copies.look_at(sent)),
        ):
            with pytest.raises(WeightUpdateError, match=f"not finite .* in {next(iter(wrong))}"):
                check()
    copies.check(copies.look_at(list(LAYERS.items())))
    check_finite(list(LAYERS.items()), plan.unbounded())


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


CHECKSUMMED = [
    (shape, dtype)
    for shape in ((5,), (4, 7), (4, 8), (2, 3, 5), (0, 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("shape", "dtype"), CHECKSUMMED)
def test_checksums_see_every_bit_and_the_order_of_rows_whatever_the_layout(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    spread = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    spread.copy_(tensor)
    assert checksum(tensor) == checksum(spread)
    if tensor.numel():
        assert checksum(tensor) != checksum(tensor.flip(0))
    for position in range(tensor.numel()):
        for bit in range(8 * dtype.itemsize):
            assert checksum(tensor) != checksum(_flipped(tensor, bit, position)), (position, bit)


@pytest.mark.parametrize(("shape", "dtype"), CHECKSUMMED)
def test_checksums_see_signs_that_change_in_two_rows(shape, dtype):
    """The highest bit of a 64-bit word is its own negative: whatever its factor is, two of them add up to none."""
    tensor, sign = torch.randn(shape).to(dtype), 8 * dtype.itemsize - 1
    ends = range(shape[-1] - 1, tensor.numel(), shape[-1]) if len(shape) > 1 else range(len(tensor))
    for first, second in itertools.combinations(ends, 2):
        assert checksum(tensor) != checksum(_flipped(tensor, sign, first, second)), (first, second)


def _flipped(tensor, bit, *positions):
    flipped = tensor.clone()
    memory = flipped.view(-1).view(torch.uint8)
    for position in positions:
        memory[position * tensor.element_size() + bit // 8] ^= 1 << bit % 8
    return flipped
