"""Buffers that checkpoints hold, in an engine that began with noise in the place of all weights: Gemma 4's scalars."""

from __future__ import annotations

from importlib.util import find_spec

import engines
import pytest
import tiny
import torch

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import model as engine_model
from slipstream.vllm_compat import process
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SCALAR = "model.layers.1.layer_scalar"


@pytest.fixture(scope="module")
def gemma():
    return engines.gemma()


@pytest.fixture(scope="module")
def engine(gemma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    gemma.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    engine = ColocateEngine(
        model=str(folder), dtype="float32", max_model_len=256, max_num_seqs=4, engine_kwargs={"load_format": "dummy"}
    )
    yield engine
    engine.close()


def held(engine):
    return engine_model.model_of(process.worker_of(engine._llm)).get_buffer(SCALAR)


def test_log_probabilities_are_those_of_transformers_after_every_update(engine, gemma):
    prompts = engines.prompts(2, 20)
    for version, scalar in enumerate((2.0, 0.75)):
        gemma.model.layers[1].layer_scalar.fill_(scalar)
        engine.update_weights(version, named_tensors(gemma))
        assert held(engine).item() == scalar
        for prompt, [completion] in zip(
            prompts, engine.generate([Request(p) for p in prompts], Sampling(8, temperature=1.0)), strict=True
        ):
            expected = engines.logprobs(gemma, prompt, completion.ids)
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4


def test_an_update_without_a_buffer_is_refused(engine, gemma):
    engine.update_weights(0, named_tensors(gemma))
    before = held(engine).clone()
    with pytest.raises(WeightUpdateError, match=rf"the engine is unchanged: missing: {SCALAR}$"):
        engine.update_weights(1, [(name, tensor) for name, tensor in named_tensors(gemma) if name != SCALAR])
    assert torch.equal(held(engine), before)
    assert engine.version == 0


def test_a_buffer_that_is_not_what_was_sent_is_found(engine, gemma, monkeypatch):
    load = engine_model.load_weights

    def other(worker, tensors):
        load(worker, [(name, tensor + 1 if name == SCALAR else tensor) for name, tensor in tensors])

    with monkeypatch.context() as patch:
        patch.setattr(engine_model, "load_weights", other)
        with pytest.raises(WeightUpdateError, match=rf"differs from what was sent: {SCALAR} \(in {SCALAR}\)"):
            engine.update_weights(1, named_tensors(gemma))
    engine.update_weights(2, named_tensors(gemma))
