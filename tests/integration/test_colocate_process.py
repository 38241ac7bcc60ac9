"""Engines that come and go in one process: what they leave behind, and the ways to make one."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from importlib.util import find_spec

import engines
import pytest
import tiny
import torch
import torch.distributed as dist

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import process
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(3, 20)
GREEDY = Sampling(max_tokens=16, temperature=0)


def start(path, **options):
    return ColocateEngine(**{"model": str(path), "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8} | options)


def assert_serves(engine, model):
    for prompt, [completion] in zip(PROMPTS, engine.generate([Request(p) for p in PROMPTS], GREEDY), strict=True):
        assert completion.ids == engines.greedy(model, prompt, 16, (1,))


def test_an_untied_model_from_first_update_to_close(tiny_model_untied):
    model = engines.policy(tiny_model_untied)
    engine = start(tiny_model_untied)
    with pytest.raises(RuntimeError, match="no weights yet; call update_weights first"):
        engine.generate([Request(PROMPTS[0])], GREEDY)
    for version in (1, 2, 3):
        engine.update_weights(version, named_tensors(engines.step(model, seed=version)))
        assert_serves(engine, model)
    layers = weakref.ref(process.worker_of(engine._llm).model_runner.get_model())
    assert dist.is_initialized()  # vLLM's own group, as there was none
    engine.close()
    engine.close()
    assert not dist.is_initialized()
    gc.collect()
    assert layers() is None  # nothing keeps the weights' memory
    assert engine.version is None
    for use in (engine.sleep, engine.wake, lambda: engine.update_weights(4, []), lambda: engine.generate([], GREEDY)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            use()


def test_the_trainers_process_group_outlives_engines(tiny_model, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        model = engines.policy(tiny_model)
        for version in range(2):
            engine = start(tiny_model)
            engine.update_weights(version, named_tensors(model))
            assert_serves(engine, model)
            engine.close()
            assert dist.group.WORLD is group
            one = torch.ones(1)
            dist.all_reduce(one)
            assert one.item() == 1
    finally:
        dist.destroy_process_group()


def test_an_engine_that_cannot_start_leaves_room_for_the_next(tiny_model):
    with pytest.raises(ValueError, match=r"(?s)max_model_len"):
        start(tiny_model, max_model_len=100_000)
    assert not dist.is_initialized()
    engine = start(tiny_model, engine_kwargs={"load_format": "dummy"})
    model = engines.policy(tiny_model)
    engine.update_weights(0, named_tensors(model))
    assert_serves(engine, model)
    engine.close()


def test_a_mixture_of_experts_is_refused_on_cpu(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, max_position_embeddings=128, eos_token_id=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="cannot update the weights of a mixture of experts on CPU"):
        start(tmp_path)
    assert not dist.is_initialized()


def test_transformers_own_implementation_leaves_the_trainers_class_usable(tiny_model):
    model = engines.policy(tiny_model)
    ids = torch.tensor(PROMPTS)
    before = model(ids, labels=ids).loss
    before.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    for round_ in range(2):
        engine = start(tiny_model, model_impl="transformers")
        engine.update_weights(round_, named_tensors(model))
        assert_serves(engine, model)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert torch.equal(loss, before)
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, gradient)
        fresh = engines.policy(tiny_model)  # made while an engine is alive, as a reference model is
        assert torch.equal(fresh(ids, labels=ids).loss, before)
        engines.step(fresh, seed=round_)
        engine.update_weights(round_ + 1, named_tensors(fresh))
        assert_serves(engine, fresh)
        engine.close()
    model.eval()
    model.generate(ids[:1], max_new_tokens=2, do_sample=False)


def test_bfloat16_engine_of_a_float32_trainer(tiny_model):
    model = engines.policy(tiny_model)
    engine = start(tiny_model, dtype="bfloat16")
    rounded = engines.policy(tiny_model)
    for version in range(3):
        engine.update_weights(version, named_tensors(engines.step(model, seed=version)))
        rounded.load_state_dict(model.state_dict())
        rounded.bfloat16().float()
        for prompt, [completion] in zip(PROMPTS, engine.generate([Request(p) for p in PROMPTS], GREEDY), strict=True):
            expected = engines.logprobs(rounded, prompt, completion.ids)
            assert (expected - torch.tensor(completion.logprobs)).abs().mean() < 0.05
    engine.close()


TRAINER_THAT_GOES = """
import gc, sys, weakref
from slipstream import GRPOConfig, GRPOTrainer

args = GRPOConfig(sys.argv[2], use_vllm=True, vllm_max_model_length=64, max_completion_length=8, report_to=[])
trainer = GRPOTrainer(sys.argv[1], lambda completions, **_: [0.0] * len(completions), args, [{"prompt": "a"}] * 8)
model = weakref.ref(trainer.model)
trainer.close()
del trainer
gc.collect()
assert model() is None
"""


def test_a_trainer_that_was_closed_can_be_freed(tiny_model, tmp_path):
    # In a process of its own: what keeps it is the first import of vLLM, in the trainer's __init__.
    done = subprocess.run(
        [sys.executable, "-c", TRAINER_THAT_GOES, str(tiny_model), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
