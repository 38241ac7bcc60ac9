"""One engine in this process, on CPU, against transformers on the same weights."""

from __future__ import annotations

import os
import random
from importlib.util import find_spec

import engines
import numpy
import pytest
import torch

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import model as engine_model
from slipstream.vllm_compat import process
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError
from slipstream.weights.transports import in_place

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(4, 140)  # longer than one block of the prefix cache (128 tokens)
GREEDY = Sampling(max_tokens=24, temperature=0)
EOS = (1,)


@pytest.fixture(scope="module")
def shared(tiny_model):
    engine = ColocateEngine(model=str(tiny_model), dtype="float32", max_model_len=256, max_num_seqs=16)
    yield engine
    engine.close()


@pytest.fixture
def model(tiny_model):
    return engines.policy(tiny_model)


@pytest.fixture
def engine(shared, model):
    """The shared engine with the weights of `model`, version 0."""
    shared.update_weights(0, named_tensors(model))
    return shared


def assert_serves(engine, model):
    """The engine computes with the weights of `model`, and with nothing it cached before."""
    for prompt, [completion] in zip(PROMPTS, engine.generate([Request(p) for p in PROMPTS], GREEDY), strict=True):
        assert completion.ids == engines.greedy(model, prompt, 24, EOS)
        difference = engines.logprobs(model, prompt, completion.ids) - torch.tensor(completion.logprobs)
        assert difference.abs().max() < 1e-4
        assert completion.weight_version == engine.version


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_transformers(engine, model, temperature):
    answers = engine.generate([Request(p, n=2, seed=7) for p in PROMPTS], Sampling(32, temperature=temperature))
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        for completion in completions:
            expected = engines.logprobs(model, prompt, completion.ids, temperature)
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4


def test_logprobs_are_renormalized_over_kept_tokens(engine, model):
    [[completion]] = engine.generate([Request(PROMPTS[0], seed=3)], Sampling(8, top_k=2))
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[0], *completion.ids]])).logits[0, 139:-1]
    top = logits.topk(2)
    for row, token, logprob in zip(range(8), completion.ids, completion.logprobs, strict=True):
        place = top.indices[row].tolist().index(token)
        assert top.values[row].log_softmax(-1)[place] == pytest.approx(logprob, abs=1e-4)


def test_greedy_tokens_follow_three_updates(engine, model):
    assert_serves(engine, model)
    for version in (1, 2, 3):
        engines.step(model, seed=version)
        report = engine.update_weights(version, named_tensors(model))
        assert engine.version == report.version == version
        assert report.nbytes == sum(p.nbytes for p in model.parameters())
        assert report.tensors == len(list(model.parameters()))
        assert_serves(engine, model)


def test_prefixes_cached_with_old_weights_are_not_used(engine, model, monkeypatch):
    def difference():
        [[completion]] = engine.generate([Request(PROMPTS[0])], GREEDY)
        return (engines.logprobs(model, PROMPTS[0], completion.ids) - torch.tensor(completion.logprobs)).abs().max()

    assert difference() < 1e-4
    engines.step(model, seed=1, scale=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(process, "reset_caches", lambda llm: None)
        engine.update_weights(1, named_tensors(model))
        assert difference() > 1e-2  # the test would not see a missing reset if the prefix were not cached
    engine.update_weights(2, named_tensors(model))
    assert difference() < 1e-4


def test_a_completion_depends_on_its_own_seed_alone(engine):
    sampling = Sampling(20)
    [four] = engine.generate([Request(PROMPTS[0], n=4, seed=11)], sampling)
    parts = [Request(PROMPTS[0], n=n, seed=seed) for n, seed in ((2, 11), (2, 13), (1, 12))]
    [two, more, one] = engine.generate(parts, sampling)
    assert [c.ids for c in four] == [c.ids for c in [*two, *more]]
    assert one[0].ids == four[1].ids
    assert len({tuple(c.ids) for c in four}) == 4


def test_greedy_completions_of_a_request_are_equal_but_not_shared(engine):
    [[first, second]] = engine.generate([Request(PROMPTS[0], n=2)], GREEDY)
    assert first.ids == second.ids
    assert first.ids is not second.ids


def test_finish_reasons_and_missing_logprobs(engine):
    [[whole]] = engine.generate([Request(PROMPTS[0])], GREEDY)
    stop = whole.ids[5]
    [[cut]] = engine.generate([Request(PROMPTS[0])], Sampling(24, 0, logprobs=False, extra={"stop_token_ids": [stop]}))
    assert cut.ids == whole.ids[: whole.ids.index(stop) + 1]
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.logprobs is None
    assert engine.generate([], GREEDY) == []


def test_regex(engine):
    [completions] = engine.generate([Request(PROMPTS[0], n=3, seed=0)], Sampling(8, regex="[0-9]{3}"))
    tokenizer = engine._llm.get_tokenizer()
    assert all(tokenizer.decode(c.ids, skip_special_tokens=True).isdigit() for c in completions)


def test_requests_that_cannot_be_answered_are_refused(engine):
    with pytest.raises(ValueError, match=r"request 1 has 250 prompt tokens; with max_tokens=24 .* max_model_len=256"):
        engine.generate([Request(PROMPTS[0]), Request([5] * 250)], GREEDY)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([Request([])], GREEDY)
    with pytest.raises(ValueError, match=r"no option 'bad_word'.*'bad_words'"):
        engine.generate([Request(PROMPTS[0])], Sampling(4, extra={"bad_word": ["x"]}))
    with pytest.raises(ValueError, match="'top_p' has a field of its own"):
        engine.generate([Request(PROMPTS[0])], Sampling(4, extra={"top_p": 0.5}))


def test_the_process_stays_the_trainers(engine, model):
    def state():
        attributes = (torch.set_num_threads, torch.Event, torch.Tensor.pin_memory, torch.accelerator.synchronize)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        precision = torch.get_float32_matmul_precision()
        return attributes, environment, torch.get_num_threads(), torch.get_default_dtype(), precision

    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    expected = (random.random(), numpy.random.rand(), torch.rand(3))
    before = state()
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    unseeded = [engine.generate([Request(PROMPTS[0])], Sampling(20))[0][0].ids for _ in range(2)]
    engine.update_weights(1, named_tensors(model))
    assert (random.random(), numpy.random.rand()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])
    assert state() == before
    assert torch.is_grad_enabled()
    assert unseeded[0] != unseeded[1]  # the engine's own random stream goes on


def test_training_goes_on_beside_the_engine(engine, model):
    model.train()
    ids = torch.tensor(PROMPTS)
    reference = model(ids, labels=ids).loss
    engine.generate([Request(p, n=2) for p in PROMPTS], Sampling(8))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.equal(loss, reference)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def without(name):
    return lambda tensors: [(n, t) for n, t in tensors if n != name]


def changed(name, change):
    return lambda tensors: [(n, change(t.clone()) if n == name else t) for n, t in tensors]


def spoiled(tensor, value):
    tensor.view(-1)[7] = value
    return tensor


Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(NORM), r"missing: model\.norm\.weight"),
        (without(Q), r"incomplete .*: model\.layers\.0\.self_attn\.qkv_proj\.weight \(4096 of 8192 values\)"),
        (without("model.embed_tokens.weight"), r"missing: model\.embed_tokens\.weight"),
        (lambda tensors: [*tensors, tensors[3]], r"sent twice: model\.layers\.0\.self_attn\.k_proj\.weight"),
        (lambda tensors: [*tensors, ("model.vision.weight", torch.zeros(2))], r"model\.vision\.weight"),
        (lambda tensors: [*tensors, ("lm_head.weight", tensors[0][1])], r"unexpected .*: lm_head\.weight"),
        (
            changed(Q, lambda t: t[:32]),
            r"cannot take 'model\.layers\.0\.self_attn\.q_proj\.weight' of shape \(32, 64\)",
        ),
        (changed(Q, lambda t: spoiled(t, float("nan"))), r"not finite .*q_proj\.weight"),
        (changed(NORM, lambda t: spoiled(t, float("inf"))), r"not finite .*model\.norm\.weight"),
        (changed("model.embed_tokens.weight", lambda t: spoiled(t, -float("inf"))), r"not finite .*model\.embed_tok"),
    ],
    ids=["missing", "fused", "embedding", "duplicate", "unknown", "tied", "shape", "nan", "inf", "inf-embedding"],
)
def test_a_refused_update_leaves_the_old_version_serving(engine, model, spoil, message):
    engine.update_weights(4, named_tensors(model))
    sent = [
        (name, tensor.clone()) for name, tensor in named_tensors(engines.step(engines.policy(model.name_or_path), 1))
    ]
    with pytest.raises(WeightUpdateError, match=message) as caught:
        engine.update_weights(5, spoil(sent))
    assert "the engine is unchanged" in str(caught.value)
    assert not isinstance(caught.value, in_place.LoadFailedError)
    assert engine.version == 4
    assert_serves(engine, model)


def keep_stale_head(patch):
    patch.setattr(engine_model, "repack_tied_heads", lambda model: None)


def flip(name, index):
    """Change the lowest bit of one value of an engine parameter, after the load."""

    def spoil(patch):
        load = engine_model.load_weights

        def load_and_flip(worker, tensors):
            load(worker, tensors)
            values = dict(worker.model_runner.get_model().named_parameters())[name].data.view(-1)
            values.view(torch.int32)[index] ^= 1

        patch.setattr(engine_model, "load_weights", load_and_flip)

    return spoil


def forget_layer(patch):
    """Load all but one layer, which keeps its old weights."""
    load = engine_model.load_weights

    def load_most(worker, tensors):
        load(worker, [(name, tensor) for name, tensor in tensors if ".layers.1.mlp." not in name])

    patch.setattr(engine_model, "load_weights", load_most)


def break_off(patch):
    load = engine_model.load_weights

    def half(tensors):
        yield from tensors[:9]
        raise OSError("the line went dead")

    patch.setattr(engine_model, "load_weights", lambda worker, tensors: load(worker, half(tensors)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (keep_stale_head, r"differs from what was sent: lm_head \(packed copy\)"),
        (flip(NORM, 3), r"differs from what was sent: model\.norm\.weight"),
        (flip("model.embed_tokens.weight", 700), r"model\.embed_tokens\.weight"),
        (
            flip("model.layers.1.self_attn.qkv_proj.bias", 70),
            r"layers\.1\.self_attn\.k_proj\.bias \(in .*qkv_proj\.b",
        ),
        (forget_layer, r"layers\.1\.mlp\.gate_up_proj \(packed copy\), model\.layers\.1\.mlp\.down_proj \(packed"),
        (break_off, r"the line went dead"),
    ],
    ids=["stale-head", "norm", "embedding", "fused-bias", "stale-layer", "broken-off"],
)
@pytest.mark.parametrize("scale", [0.02, 1e-6], ids=["far", "near"])
def test_a_failed_load_is_noticed_and_repaired(engine, model, monkeypatch, spoil, message, scale):
    engines.step(model, seed=1, scale=scale)
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.raises(in_place.LoadFailedError, match=message):
            engine.update_weights(1, named_tensors(model))
    assert engine.version is None
    with pytest.raises(RuntimeError, match="last weight update failed"):
        engine.generate([Request(PROMPTS[0])], GREEDY)
    engine.update_weights(2, named_tensors(model))
    assert_serves(engine, model)


def test_merged_adapters_serve(engine, tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(engines.policy(tiny_model), config)
    engine.update_weights(1, named_tensors(model))
    assert_serves(engine, model)


def test_options_are_checked_before_an_engine_starts(tiny_model):
    def start(**options):
        return ColocateEngine(model=str(tiny_model), dtype="float32", **options)

    with pytest.raises(ValueError, match=r"no option 'max_num_batched_token'.*'max_num_batched_tokens'"):
        start(engine_kwargs={"max_num_batched_token": 512})
    with pytest.raises(ValueError, match="'max_model_len' has a field of its own"):
        start(engine_kwargs={"max_model_len": 512})
    with pytest.raises(ValueError, match="logprobs_mode='raw_logprobs'"):
        start(engine_kwargs={"logprobs_mode": "raw_logprobs"})
    with pytest.raises(ValueError, match=r"vllm_tensor_parallel_size=2: .*there is 1\. Start .*--num_processes 2"):
        start(tensor_parallel_size=2)
    with pytest.raises(RuntimeError, match="vllm_enable_sleep_mode"):
        start(enable_sleep_mode=True)


def test_two_engines_at_a_time_are_refused(engine, tiny_model):
    with pytest.raises(RuntimeError, match=r"another ColocateEngine is alive.*trainer\.close\(\)"):
        ColocateEngine(model=str(tiny_model), dtype="float32", max_model_len=256)


def test_sleep_is_refused_where_vllm_would_ignore_it(engine):
    with pytest.raises(RuntimeError, match="vllm_enable_sleep_mode=True"):
        engine.sleep()
    with pytest.raises(RuntimeError, match="awake already"):
        engine.wake()


def test_a_reset_of_caches_reaches_every_block_with_contents(engine):
    engine.generate([Request(p, n=2) for p in PROMPTS], Sampling(32))
    pool = engine._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    blocks = list(pool.blocks)
    assert any(block.block_hash is not None for block in blocks)
    with engine._guest.inside():
        process.reset_caches(engine._llm)
    assert pool.blocks == blocks
    assert all(block.block_hash is None for block in blocks)
    used = pool.get_new_blocks(1)
    assert not pool.reset_prefix_cache()  # refused, since one is used
    assert pool.blocks == blocks
    pool.free_blocks(used)


def test_nothing_but_the_packing_of_a_cpu_stands_against_copies(engine, monkeypatch):
    """What more than copies it takes to load this model on a GPU: nothing, in this version's layers."""
    worker = process.worker_of(engine._llm)
    assert "packed copy" in engine_model.more_than_copies(worker)
    monkeypatch.setattr(engine_model, "on_cpu", lambda: False)
    assert engine_model.more_than_copies(worker) is None
    attention = next(m for n, m in worker.model_runner.get_model().named_modules() if n.endswith("self_attn.attn"))
    monkeypatch.setattr(attention, "made_of_weights", torch.zeros(1), raising=False)
    assert "made_of_weights (a tensor beside the parameters)" in engine_model.more_than_copies(worker)
