"""Images in a vLLM engine beside the trainer: what it samples is what transformers scores, picture by picture."""

from __future__ import annotations

import pytest
import tiny_vision
import torch
from test_images import rows as dataset
from test_images import settings as shared
from test_images import user, vowels
from transformers import AutoModelForImageTextToText, AutoProcessor

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.records import Images
from slipstream.rollouts.prompts import PromptRenderer

RED, GREEN = (210, 20, 20), (20, 210, 20)
LIMITS = {"limit_mm_per_prompt": {"image": 2}}
SAMPLING = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def folder(tiny_vision_model):
    return tiny_vision_model


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def renderer(folder):
    processor = AutoProcessor.from_pretrained(folder)
    return PromptRenderer(processor.tokenizer, processor=processor)


@pytest.fixture(scope="module")
def engine(folder, model):
    made = ColocateEngine(model=str(folder), dtype="float32", max_model_len=256, engine_kwargs=LIMITS)
    made.update_weights(0, list(model.state_dict().items()))
    yield made
    made.close()


def prompt(renderer, *pictures, text="What is it?"):
    return renderer.render({"prompt": user(text), "images": list(pictures)}, 0)


def asked(prompt, n=2, seed=3):
    return Request(prompt.ids, n, seed, images=prompt.images)


@torch.no_grad()
def scored(model, prompt, ids):
    inputs = {} if prompt.images is None else prompt.images.features
    logits = model(torch.tensor([[*prompt.ids, *ids]]), **inputs).logits[0, len(prompt.ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def difference(model, prompt, completions):
    return max((scored(model, prompt, c.ids) - torch.tensor(c.logprobs)).abs().max().item() for c in completions)


def prompts(renderer):
    red, wide = tiny_vision.picture(RED), tiny_vision.picture(GREEN, (48, 24))
    return [prompt(renderer, red), prompt(renderer, wide), prompt(renderer, red, wide), prompt(renderer)]


def test_log_probabilities_are_transformers_whatever_else_is_in_the_call(engine, model, renderer):
    given = prompts(renderer)
    answers = engine.generate([asked(p) for p in given], SAMPLING)
    for one, completions in zip(given, answers, strict=True):
        assert len(completions) == 2
        assert difference(model, one, completions) < 1e-3


def test_another_picture_is_another_prompt(engine, model, renderer):
    red, green = (prompt(renderer, tiny_vision.picture(color)) for color in (RED, GREEN))
    assert red.ids == green.ids
    [completions], [others] = engine.generate([asked(red)], SAMPLING), engine.generate([asked(green)], SAMPLING)
    assert difference(model, red, completions) < 1e-3  # no cached prefix of the other picture
    assert difference(model, green, others) < 1e-3
    assert difference(model, green, completions) > 0.05


def test_updated_weights_of_what_sees_are_used_at_once(engine, model, renderer, folder):
    """Pictures that were seen before are looked at again."""
    given = prompts(renderer)
    changed = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "vision" in name or "connector" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    engine.update_weights(1, list(changed.state_dict().items()))
    try:
        answers = engine.generate([asked(p) for p in given], SAMPLING)
        for one, completions in zip(given, answers, strict=True):
            assert difference(changed, one, completions) < 1e-3
        assert difference(model, given[0], answers[0]) > 0.01
    finally:
        engine.update_weights(0, list(model.state_dict().items()))


def test_a_placeholder_ends_a_completion(engine, model, renderer):
    placeholder = model.config.image_token_id
    one = prompt(renderer, tiny_vision.picture(RED))
    forced = Sampling(max_tokens=8, extra={"logit_bias": {placeholder: 100.0}}, ends=(placeholder,))
    [[completion]] = engine.generate([asked(one, 1)], forced)
    assert completion.ids == [placeholder]


def test_a_processor_with_other_settings_is_found_out(engine, renderer):
    one = prompt(renderer, tiny_vision.picture(RED))
    other = Request([*one.ids[:20], *one.ids[21:]], images=one.images)
    with pytest.raises(RuntimeError, match=r"request 1 has images.*from token \d+ on they differ.*mm_processor_kwargs"):
        engine.generate([asked(one, 1), other], SAMPLING)


def test_requests_need_no_features_of_the_trainers(engine, model, renderer):
    one = prompt(renderer, tiny_vision.picture(RED))
    bare = Request(one.ids, images=Images(one.images.pictures, one.images.engine_ids))
    [completions] = engine.generate([bare], SAMPLING)
    assert difference(model, one, completions) < 1e-3


# Own engines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_module", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_grpo_learns_from_what_the_engine_sampled(folder, engine, tmp_path, as_module):
    engine.close()  # one engine at a time is alive in a process
    args = GRPOConfig(**shared(tmp_path, use_vllm=True, num_generations=4, max_steps=3, vllm_engine_kwargs=LIMITS))
    given, processor = str(folder), None
    if as_module:
        given, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    trainer = GRPOTrainer(given, vowels, args, dataset(), processing_class=processor)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.close()
    assert len(logs) == 3
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logs) < 1e-3
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert any("vision_model" in name for name in changed)
