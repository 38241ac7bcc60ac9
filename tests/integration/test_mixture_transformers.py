"""Sampling from mixtures of policy and reference with transformers' generate."""

from __future__ import annotations

import contextlib

import engines
import pytest
import torch

from slipstream.generation.engine import Request, Sampling
from slipstream.generation.transformers import TransformersEngine

PAD, EOS = 0, 1
PROMPTS = [engines.prompts(1, length, seed=length)[0] for length in (30, 7, 19)]
SHARES = [0.0, 0.3, 0.5, 1.0]


def requests(share):
    return [Request(prompt, n=2, seed=9, mixture=share) for prompt in PROMPTS]


@pytest.fixture
def models(tiny_model):
    return [engines.step(engines.policy(tiny_model), seed, scale=0.1) for seed in (1, 2)]


def make(models, **options):
    policy, reference = models
    engine = TransformersEngine(
        lambda: policy,
        pad_token_id=PAD,
        eos_token_ids=[EOS],
        reference=lambda: contextlib.nullcontext(reference),
        **options,
    )
    engine.update_weights(3, [])
    return engine


@torch.no_grad()
def mixed(policy, reference, prompt, ids, share):
    """Logits (tokens, vocabulary) that `ids` were sampled from; without caches and padding."""
    rows = torch.tensor([[*prompt, *ids]])
    logits = share * reference(rows).logits.double() + (1 - share) * policy(rows).logits.double()
    return logits[0, len(prompt) - 1 : -1]


def assert_samples(answers, logits_of, temperature=1.0):
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        assert len(completions) == 2
        for completion in completions:
            logps = (logits_of(prompt, completion.ids) / temperature).log_softmax(-1)
            expected = logps.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_mixture(models, share, temperature):
    engine = make(models, batch_size=4)
    answers = engine.generate(requests(share), Sampling(20, temperature=temperature))
    assert_samples(answers, lambda prompt, ids: mixed(*models, prompt, ids, share), temperature)
    engines.step(models[0], 5, scale=0.1)
    engines.step(models[1], 6, scale=0.1)
    answers = engine.generate(requests(share), Sampling(20, temperature=temperature))
    assert_samples(answers, lambda prompt, ids: mixed(*models, prompt, ids, share), temperature)


def test_what_the_model_is_told_to_avoid_is_avoided_after_mixing(models):
    def logits_of(prompt, ids):
        logits = mixed(*models, prompt, ids, 0.5)
        logits[:, 40] += 3.0  # the bias is not mixed
        logits[:, EOS] = -torch.inf
        return logits

    extra = {"sequence_bias": [[[40], 3.0]], "suppress_tokens": [EOS]}
    answers = make(models).generate(requests(0.5), Sampling(12, extra=extra))
    assert_samples(answers, logits_of)
    assert {len(c.ids) for group in answers for c in group} == {12}


def test_only_what_is_sampled_from_runs(models):
    ran = []
    for model, name in zip(models, ("policy", "reference"), strict=True):
        model.register_forward_hook(lambda *_, name=name: ran.append(name))
    counts = []
    for share in SHARES:
        ran.clear()
        make(models).generate(requests(share), Sampling(5, extra={"suppress_tokens": [EOS]}))
        counts.append((ran.count("policy"), ran.count("reference")))
    assert counts == [(5, 0), (5, 5), (5, 5), (0, 5)]


def test_the_policys_samples_do_not_change(models):
    plain = TransformersEngine(lambda: models[0], pad_token_id=PAD, eos_token_ids=[EOS])
    plain.update_weights(0, [])
    expected = [[c.ids for c in group] for group in plain.generate(requests(0.0), Sampling(12))]
    engine = make(models)
    engine.generate(requests(0.5), Sampling(12))
    assert [[c.ids for c in group] for group in engine.generate(requests(0.0), Sampling(12))] == expected


@pytest.mark.parametrize("share", SHARES)
def test_an_adapters_reference_is_the_policy_with_the_adapter_off(tiny_model, share):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(engines.policy(tiny_model), config).train()

    @contextlib.contextmanager
    def reference():
        with adapted.disable_adapter():
            yield adapted

    engine = TransformersEngine(lambda: adapted, pad_token_id=PAD, eos_token_ids=[EOS], reference=reference)
    engine.update_weights(0, [])
    answers = engine.generate(requests(share), Sampling(12))
    assert adapted.training
    base = engines.policy(tiny_model)
    assert (mixed(adapted.eval(), base, PROMPTS[0], [7], 0.0) - mixed(adapted, base, PROMPTS[0], [7], 1.0)).norm() > 1
    assert_samples(answers, lambda prompt, ids: mixed(adapted, base, prompt, ids, share))


def test_what_it_refuses(models):
    engine = make(models)
    with pytest.raises(ValueError, match=r"mixtures 0\.0, 0\.5"):
        engine.generate([*requests(0.0), *requests(0.5)], Sampling(4))
    with pytest.raises(ValueError, match=r"mixture=-0\.1 is not allowed"):
        engine.generate(requests(-0.1), Sampling(4))
    assert engine.update_reference([]).nbytes == 0
    alone = TransformersEngine(lambda: models[0], pad_token_id=PAD, eos_token_ids=[EOS])
    alone.update_weights(0, [])
    with pytest.raises(ValueError, match=r"mixture=0\.5 .*give `reference` to build_engine"):
        alone.generate(requests(0.5), Sampling(4))
    with pytest.raises(ValueError, match="update_reference"):
        alone.update_reference([])
    batching = make(models, continuous_batching={"max_memory_percent": 0.1})
    with pytest.raises(ValueError, match="use_transformers_continuous_batching=True"):
        batching.generate(requests(0.5), Sampling(4, logprobs=False))
