"""The colocated engine on an NVIDIA GPU: exact updates, sleep and wake, memory, and the trainer's streams."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import model as engine_model
from slipstream.vllm_compat import process
from slipstream.weights import direct
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError
from slipstream.weights.transports import in_place

pytestmark = pytest.mark.gpu

GREEDY = Sampling(max_tokens=24, temperature=0)
GIB = 1 << 30
# max |difference| of log-probabilities, about twice what an H200 shows; a stale layer gives several nats
LIMITS = {"float32": 5e-2, "bfloat16": 1.0}
OPTIONS = {"max_model_len": 256, "max_num_seqs": 16, "gpu_memory_utilization": 0.2, "enable_sleep_mode": True}


def free_memory():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def prompts(count, length):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 100, (length,), generator=generator).tolist() for _ in range(count)]


PROMPTS = prompts(4, 140)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models") / "small", hidden=256, layers=4)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def shared(request, path):
    # bfloat16 with CUDA graphs, as in training; float32 without, which starts faster.
    eager = {"enforce_eager": True} if request.param == "float32" else {}
    engine = ColocateEngine(model=str(path), dtype=request.param, engine_kwargs=eager, **OPTIONS)
    engine.dtype = request.param
    yield engine
    engine.close()


@pytest.fixture
def model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()


@pytest.fixture
def engine(shared, model):
    shared.update_weights(0, named_tensors(model))
    return shared


def step(model, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, device="cuda") * 0.02)


@torch.no_grad()
def assert_serves(engine, model):
    for prompt, [completion] in zip(PROMPTS, engine.generate([Request(p) for p in PROMPTS], GREEDY), strict=True):
        logits = model(torch.tensor([[*prompt, *completion.ids]], device="cuda")).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).cpu().gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        difference = (expected - torch.tensor(completion.logprobs)).abs()
        assert difference.max() < LIMITS[engine.dtype]
        assert completion.weight_version == engine.version


def test_updates_arrive_bit_by_bit(engine, model):
    assert_serves(engine, model)
    for version in (1, 2, 3):
        step(model, seed=version)
        engine.update_weights(version, named_tensors(model))  # compares every value itself
        assert_serves(engine, model)
    # By the third, loading has been seen to be nothing but copies.
    assert engine.timings.direct, engine.timings
    print(engine.dtype, engine.timings)


def test_a_changed_value_is_noticed(engine, model, monkeypatch):
    load, copy = engine_model.load_weights, direct.Copies.copy
    changed = process.worker_of(engine._llm)

    def change():
        engine_model.parameters(changed)["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.5

    def load_and_change(worker, tensors):
        load(worker, tensors)
        change()

    def copy_and_change(copies, sources):
        copy(copies, sources)
        change()

    with monkeypatch.context() as patch:  # whichever of the two this update takes
        patch.setattr(engine_model, "load_weights", load_and_change)
        patch.setattr(direct.Copies, "copy", copy_and_change)
        with pytest.raises(in_place.LoadFailedError, match=r"layers\.2\.mlp\.down_proj\.weight"):
            engine.update_weights(1, named_tensors(model))
    with pytest.raises(RuntimeError, match="last weight update failed"):
        engine.generate([Request(PROMPTS[0])], GREEDY)
    engine.update_weights(2, named_tensors(model))
    assert_serves(engine, model)


def test_a_refused_update_leaves_the_old_version_serving(engine, model):
    with pytest.raises(WeightUpdateError, match=r"the engine is unchanged: .*qkv_proj\.weight"):
        engine.update_weights(1, [nt for nt in named_tensors(model) if "layers.1.self_attn.v_proj.weight" not in nt[0]])
    spoiled = [(name, tensor.clone()) for name, tensor in named_tensors(model)]
    spoiled[3][1].view(-1)[0] = float("nan")
    with pytest.raises(WeightUpdateError, match="not finite"):
        engine.update_weights(1, spoiled)
    assert engine.version == 0
    assert_serves(engine, model)


def test_level_1_keeps_the_weights_and_frees_the_memory(engine, model):
    before = free_memory()
    engine.sleep(1)
    assert free_memory() - before > GIB
    with pytest.raises(RuntimeError, match=r"asleep \(level 1\)"):
        engine.generate([Request(PROMPTS[0])], GREEDY)
    with pytest.raises(RuntimeError, match="update_weights: the engine is asleep"):
        engine.update_weights(1, named_tensors(model))
    with pytest.raises(RuntimeError, match="sleep: the engine is asleep"):
        engine.sleep(2)
    engine.wake()
    assert engine.version == 0
    assert_serves(engine, model)
    step(model, seed=1)
    engine.sleep(1)
    engine.wake(["weights"])
    engine.update_weights(1, named_tensors(model))
    engine.wake(["kv_cache"])
    assert_serves(engine, model)


def test_level_2_drops_the_weights_and_an_update_brings_them_back(engine, model):
    before = free_memory()
    engine.sleep(2)
    assert free_memory() - before > GIB
    assert engine.version is None
    engine.wake(["weights"])
    asleep = free_memory()
    with pytest.raises(RuntimeError, match="half awake"):
        engine.generate([Request(PROMPTS[0])], GREEDY)
    step(model, seed=2)
    engine.update_weights(5, named_tensors(model))
    engine.wake(["kv_cache"])
    assert asleep - free_memory() > GIB  # the cache's memory was free during the update
    assert_serves(engine, model)
    engine.sleep(2)
    engine.wake()
    with pytest.raises(RuntimeError, match="level 2 sleep dropped the weights; call update_weights"):
        engine.generate([Request(PROMPTS[0])], GREEDY)
    engine.update_weights(6, named_tensors(model))
    assert_serves(engine, model)


def test_the_trainers_device_state_is_untouched(engine, model):
    torch.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    stream, precision = torch.cuda.current_stream(), torch.get_float32_matmul_precision()
    torch.manual_seed(3)
    [first], [second] = (engine.generate([Request(PROMPTS[0])], Sampling(24))[0] for _ in range(2))
    engine.update_weights(1, named_tensors(model))
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    assert torch.cuda.current_stream() == stream
    assert torch.get_float32_matmul_precision() == precision
    assert first.ids != second.ids
    model.train()
    ids = torch.tensor(PROMPTS, device="cuda")
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_closing_gives_the_memory_back(shared, path):
    """The module's engine ends here; a second one starts, answers, and leaves as much memory as it found."""
    shared.close()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    torch.cuda.empty_cache()
    before = free_memory()
    engine = ColocateEngine(
        model=str(path), dtype="float32", max_model_len=256, gpu_memory_utilization=0.2, model_impl="transformers",
        engine_kwargs={"enforce_eager": True},
    )  # fmt: skip
    engine.dtype = "float32"
    assert before - free_memory() > GIB
    engine.update_weights(0, named_tensors(model))
    assert_serves(engine, model)
    ids = torch.tensor(PROMPTS, device="cuda")
    model(ids, labels=ids).loss.backward()  # the class that the engine's own model shares
    engine.close()
    assert before - free_memory() < GIB / 2
