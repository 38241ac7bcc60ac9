"""Generation with the trainer's own model."""

from __future__ import annotations

import random

import engines
import pytest
import torch

from slipstream.generation.engine import Request, Sampling
from slipstream.generation.transformers import TransformersEngine
from slipstream.weights.export import named_tensors

PAD, EOS = 0, 1
PROMPTS = [engines.prompts(1, length, seed=length)[0] for length in (30, 7, 19)]
REQUESTS = [Request(p, n=2, seed=9 + i) for i, p in enumerate(PROMPTS)]


@pytest.fixture
def model(tiny_model):
    return engines.policy(tiny_model)


def make(model, **options):
    engine = TransformersEngine(lambda: model, pad_token_id=PAD, eos_token_ids=[EOS], **options)
    engine.update_weights(3, named_tensors(model))
    return engine


def tokens(answers):
    return [[completion.ids for completion in completions] for completions in answers]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_a_forward_pass(model, temperature):
    for request, completions in zip(
        REQUESTS, make(model).generate(REQUESTS, Sampling(24, temperature=temperature)), strict=True
    ):
        assert len(completions) == 2
        for completion in completions:
            expected = engines.logprobs(model, request.prompt_ids, completion.ids, temperature)
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4
            assert completion.weight_version == 3


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.7, "min_p": 0.05}]
)
def test_filters_are_those_of_transformers(model, filters):
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    known = {"min_p": MinPLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    warp = LogitsProcessorList([kind(filters[name]) for name, kind in known.items() if name in filters])
    for request, completions in zip(REQUESTS, make(model).generate(REQUESTS, Sampling(12, **filters)), strict=True):
        for completion in completions:
            start = len(request.prompt_ids)
            with torch.no_grad():
                logits = model(torch.tensor([[*request.prompt_ids, *completion.ids]])).logits[0, start - 1 : -1]
            kept = warp(None, logits).log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert (kept - torch.tensor(completion.logprobs)).abs().max() < 1e-4


def test_greedy_tokens_end_with_the_sequence(model):
    answers = make(model).generate([Request(p) for p in PROMPTS], Sampling(24, temperature=0))
    for prompt, [completion] in zip(PROMPTS, answers, strict=True):
        assert completion.ids == engines.greedy(model, prompt, 24, (EOS,))
    [ends, *_] = [c for [c] in answers]
    stop = ends.ids[3]
    engine = TransformersEngine(lambda: model, pad_token_id=stop, eos_token_ids=[EOS, stop])
    engine.update_weights(0, [])
    [[cut], *_] = engine.generate([Request(p) for p in PROMPTS], Sampling(24, temperature=0, logprobs=False))
    assert cut.ids == ends.ids[: ends.ids.index(stop) + 1]
    assert (ends.finish_reason, cut.finish_reason, cut.logprobs) == ("length", "stop", None)


def test_repetition_penalty_ignores_padding(model):
    sampling = Sampling(16, temperature=0, repetition_penalty=1.5)
    engine = make(model)
    alone = [engine.generate([Request(p)], sampling)[0][0] for p in PROMPTS]
    together = engine.generate([Request(p) for p in PROMPTS], sampling)
    assert [[c.ids] for c in alone] == tokens(together)
    assert tokens(together) != tokens(engine.generate([Request(p) for p in PROMPTS], Sampling(16, temperature=0)))


def test_calls_repeat_by_seed_and_leave_the_trainers_random_states(model):
    engine = make(model)
    torch.manual_seed(1), random.seed(1)
    expected = torch.rand(2), random.random()
    torch.manual_seed(1), random.seed(1)
    first = engine.generate(REQUESTS, Sampling(16))
    torch.rand(5)
    torch.manual_seed(1), random.seed(1)
    assert tokens(engine.generate(REQUESTS, Sampling(16))) == tokens(first)
    assert torch.equal(torch.rand(2), expected[0])
    assert random.random() == expected[1]
    other = engine.generate([Request(p, n=2, seed=10) for p in PROMPTS], Sampling(16))
    assert tokens(other) != tokens(first)
    unseeded = [tokens(engine.generate([Request(PROMPTS[0])], Sampling(16))) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    assert len({tuple(c.ids) for completions in first for c in completions}) == 6


def test_batches_of_a_call(model):
    sampling = Sampling(12, temperature=0)
    assert tokens(make(model, batch_size=2).generate(REQUESTS, sampling)) == tokens(
        make(model).generate(REQUESTS, sampling)
    )
    assert make(model).generate([], sampling) == []


def test_the_models_own_generation_settings_do_not_leak(model):
    expected = tokens(make(model).generate(REQUESTS, Sampling(16)))
    model.generation_config.update(temperature=0.01, top_k=1, top_p=0.1, do_sample=True, repetition_penalty=2.0)
    assert tokens(make(model).generate(REQUESTS, Sampling(16))) == expected


@pytest.mark.parametrize("adapted", [False, True])
def test_settings_that_the_engine_has_no_name_for_do_not_leak_either(model, adapted):
    """Log-probabilities would be those of a distribution that was not sampled from."""
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    expected = make(model).generate(REQUESTS, Sampling(16))
    likely = sorted({token for completions in tokens(expected) for ids in completions for token in ids} - {EOS})
    own = model.get_base_model().generation_config if adapted else model.generation_config
    own.update(suppress_tokens=likely, min_new_tokens=16, max_time=0.0)
    assert make(model).generate(REQUESTS, Sampling(16)) == expected
    assert model.generation_config is own
    assert own.suppress_tokens == likely
    asked = make(model).generate(REQUESTS, Sampling(16, extra={"suppress_tokens": likely}))
    assert not {token for completions in tokens(asked) for ids in completions for token in ids} & set(likely)


def test_it_works_in_the_middle_of_training(model):
    model.train()
    model.model.layers[1].eval()  # a frozen part
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    flags = [module.training for module in model.modules()]
    answers = make(model).generate(REQUESTS, Sampling(8, temperature=0))
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is False
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        assert completions[0].ids == engines.greedy(model, prompt, 8, (EOS,))
    ids = torch.tensor(PROMPTS[:1])
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_adapters_are_part_of_the_policy(tiny_model, model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(engines.policy(tiny_model), config)
    answers = make(adapted).generate(REQUESTS, Sampling(12, temperature=0))
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        assert completions[0].ids == engines.greedy(adapted, prompt, 12, (EOS,))
    assert tokens(answers) != tokens(make(model).generate(REQUESTS, Sampling(12, temperature=0)))


def test_what_it_cannot_do_it_says(model):
    engine = TransformersEngine(lambda: model, pad_token_id=PAD, eos_token_ids=[EOS])
    with pytest.raises(RuntimeError, match="call update_weights first"):
        engine.generate(REQUESTS, Sampling(4))
    report = engine.update_weights(1, named_tensors(model))
    assert (report.version, report.nbytes, report.tensors) == (1, 0, 0)
    with pytest.raises(ValueError, match=r"no option 'lenght_penalty'.*'length_penalty'"):
        engine.generate(REQUESTS, Sampling(4, extra={"lenght_penalty": 1.0}))
    with pytest.raises(ValueError, match="'top_k' has a field of its own"):
        engine.generate(REQUESTS, Sampling(4, extra={"top_k": 1}))
    with pytest.raises(ValueError, match="use_vllm=True"):
        engine.generate(REQUESTS, Sampling(4, regex="a"))
    assert len(engine.generate(REQUESTS[:1], Sampling(4, extra={"suppress_tokens": [EOS]}))[0][0].ids) == 4
    for verb in (engine.sleep, engine.wake):
        with pytest.raises(RuntimeError, match="generation with transformers"):
            verb()
    engine.close()
    with pytest.raises(RuntimeError, match="call update_weights first"):
        engine.generate(REQUESTS, Sampling(4))


def test_continuous_batching_answers_every_request_in_order(tiny_model):
    model = engines.policy(tiny_model)
    made = TransformersEngine(
        lambda: model, pad_token_id=0, eos_token_ids=[1], continuous_batching={"max_memory_percent": 0.1}
    )
    made.update_weights(3, [])
    prompts = [*engines.prompts(2, 5), *engines.prompts(2, 9, seed=1)]
    requests = [Request(prompt, n=2, seed=7) for prompt in prompts]
    answers = made.generate(requests, Sampling(6, temperature=0, logprobs=False))
    for prompt, group in zip(prompts, answers, strict=True):
        assert [c.ids for c in group] == [engines.greedy(model, prompt, 6, (1,))] * 2
        assert {c.weight_version for c in group} == {3}
    with pytest.raises(ValueError, match="min_p and repetition_penalty cannot be used"):
        made.generate(requests, Sampling(6, min_p=0.1, logprobs=False))


@pytest.mark.parametrize("continuous", [None, {}])
def test_a_request_may_have_a_limit_of_its_own(model, continuous):
    limits = [2, None, 5]
    requests = [Request(p, n=2, seed=9, max_tokens=limit) for p, limit in zip(PROMPTS, limits, strict=True)]
    engine = make(model, continuous_batching=continuous)
    found = engine.generate(requests, Sampling(24, logprobs=continuous is None))
    for group, limit in zip(found, limits, strict=True):
        for completion in group:
            assert completion.ids
            assert len(completion.ids) <= (limit or 24)
            ended = completion.ids[-1] == EOS
            assert completion.finish_reason == ("stop" if ended else "length")
            assert continuous is not None or len(completion.logprobs) == len(completion.ids)
    assert engine.generate([], Sampling(24)) == []
