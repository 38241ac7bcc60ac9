"""Sampling from the policy, the reference, and mixtures of both in one vLLM engine, against transformers."""

from __future__ import annotations

import gc
import importlib
import shutil
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import engines
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import mixture, process
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError
from slipstream.weights.transports import in_place

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(3, 140)  # longer than one block of the prefix cache (128 tokens)
SAMPLING = Sampling(12)
SHARES = [0.0, 0.3, 0.5, 1.0]


def start(path, **options):
    return ColocateEngine(**{"model": str(path), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8} | options)


def requests(share):
    return [Request(prompt, n=2, seed=7, mixture=share) for prompt in PROMPTS]


def fresh(path):
    """A policy and a reference that are far from one another, and from what the engine loaded."""
    return [engines.step(engines.policy(path), seed, scale=0.1) for seed in (1, 2)]


@pytest.fixture(scope="module", params=["tiny_model", pytest.param("tiny_model_untied", marks=pytest.mark.slow)])
def shared(request):
    """An engine with a reference, and what one without it samples from the same policy."""
    path = request.getfixturevalue(request.param)
    plain = start(path)
    plain.update_weights(0, named_tensors(fresh(path)[0]))
    sampled = plain.generate(requests(0.0), SAMPLING)
    plain.close()
    engine = start(path, reference=True)
    yield SimpleNamespace(engine=engine, path=path, plain=sampled)
    engine.close()


@pytest.fixture
def models(shared):
    return fresh(shared.path)


@pytest.fixture
def engine(shared, models):
    policy, reference = models
    shared.engine.update_weights(3, named_tensors(policy))
    shared.engine.update_reference(named_tensors(reference))
    return shared.engine


def error(models, share, answers, temperature=1.0):
    """The largest difference of a completion's log-probabilities to those by transformers."""
    return max(
        engines.mixture_errors(models, prompt, completion, share, temperature).max().item()
        for prompt, completions in zip(PROMPTS, answers, strict=True)
        for completion in completions
    )


def assert_samples(engine, models, *shares):
    for share in shares:
        assert error(models, share, engine.generate(requests(share), SAMPLING)) < 1e-4


def test_without_a_reference_it_says_what_to_do(tiny_model):
    engine = start(tiny_model)
    engine.update_weights(0, named_tensors(engines.policy(tiny_model)))
    with pytest.raises(ValueError, match=r"mixture=0\.5 .*give `reference` to build_engine"):
        engine.generate(requests(0.5), SAMPLING)
    with pytest.raises(ValueError, match=r"update_reference: .*give `reference` to build_engine"):
        engine.update_reference([])
    engine.close()


def test_from_the_first_update_to_close(tiny_model, tmp_path):
    # A checkpoint that holds its tied head a second time, as some tools write them.
    path = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    models = fresh(path)
    engine = start(path, reference=True)
    engine.update_weights(0, named_tensors(models[0]))
    with pytest.raises(RuntimeError, match="no reference weights yet; call update_reference first"):
        engine.generate(requests(0.5), SAMPLING)
    assert_samples(engine, models, 0.0)
    engine.update_reference(named_tensors(models[1]))
    assert_samples(engine, models, 0.5, 1.0)
    both = process.worker_of(engine._llm).model_runner.get_model()
    remains = [weakref.ref(model) for model in (both, both.policy, both.reference)]
    del both
    engine.close()
    gc.collect()
    assert [remaining() for remaining in remains] == [None] * 3  # nothing keeps the weights' memory
    with pytest.raises(RuntimeError, match="update_reference: the engine is closed"):
        engine.update_reference([])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_mixture(engine, models, share, temperature):
    answers = engine.generate(requests(share), Sampling(24, temperature=temperature))
    assert error(models, share, answers, temperature) < 1e-4
    assert {c.weight_version for group in answers for c in group} == {3}
    other = 1.0 if share < 0.5 else 0.0
    assert error(models, other, answers, temperature) > 0.1


def test_filters_come_after_mixing(engine, models):
    sampling = Sampling(8, temperature=0.7, top_k=2)
    for prompt, completions in zip(PROMPTS, engine.generate(requests(0.4), sampling), strict=True):
        for completion in completions:
            top = (engines.mixed(models, prompt, completion.ids, 0.4) / 0.7).topk(2)
            for row, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
                place = top.indices[row].tolist().index(token)
                assert top.values[row].log_softmax(-1)[place] == pytest.approx(logprob, abs=1e-4)


def test_greedy_tokens_are_the_mixtures_most_likely(engine, models):
    answers = engine.generate([Request(p, mixture=0.5) for p in PROMPTS], Sampling(12, temperature=0))
    for prompt, [completion] in zip(PROMPTS, answers, strict=True):
        assert completion.ids == engines.mixed(models, prompt, completion.ids, 0.5).argmax(-1).tolist()


def test_each_follows_its_own_updates(engine, models):
    policy, reference = models
    for version in (4, 5):
        engine.update_weights(version, named_tensors(engines.step(policy, seed=version, scale=0.1)))
        assert_samples(engine, models, 0.0, 0.5, 1.0)
        report = engine.update_reference(named_tensors(engines.step(reference, seed=-version, scale=0.1)))
        assert (report.version, report.tensors) == (0, len(list(reference.parameters())))
        assert engine.version == version
        assert_samples(engine, models, 0.0, 0.3, 1.0)


def test_prefixes_of_another_mixture_are_not_used(engine, models, monkeypatch):
    assert_samples(engine, models, 0.0, 0.5, 1.0, 0.5, 0.0)
    cached = []
    answer = engine._llm.generate

    def noting(*args, **kwargs):
        outputs = answer(*args, **kwargs)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", noting)
    assert_samples(engine, models, *SHARES)
    assert cached == [[128, 128, 128]] * 4  # those of the same mixture are
    monkeypatch.setattr(mixture, "cache_salt", lambda share: None)
    engine.update_weights(4, named_tensors(models[0]))
    assert_samples(engine, models, 0.0)
    assert error(models, 0.5, engine.generate(requests(0.5), SAMPLING)) > 0.1


def test_the_policys_samples_are_those_of_an_engine_without_reference(shared, engine):
    for share in (0.0, 0.5, 0.0):  # also after the engine has mixed
        answers = engine.generate(requests(share), SAMPLING)
        same = [[c.ids for c in group] for group in answers] == [[c.ids for c in group] for group in shared.plain]
        assert same == (share == 0.0)


def test_only_what_is_sampled_from_runs(engine, monkeypatch):
    model = process.worker_of(engine._llm).model_runner.get_model()
    ran = []
    hooks = []
    for name in ("policy", "reference"):
        part = getattr(model, name)
        for layer in (part, part.model.layers[0], part.logits_processor):
            hooks.append(layer.register_forward_hook(lambda *_, name=name: ran.append(name)))
    try:
        counts = []
        for share in SHARES:
            ran.clear()
            engine.generate([Request(PROMPTS[0], seed=1, mixture=share)], Sampling(5, extra={"ignore_eos": True}))
            counts.append((ran.count("policy"), ran.count("reference")))
    finally:
        for hook in hooks:
            hook.remove()
    [(steps, none), *between, (nothing, _)] = counts
    assert steps >= 15  # three modules, five tokens
    assert counts == [(steps, 0), (steps, steps), (steps, steps), (0, steps)]
    assert (none, nothing, len(between)) == (0, 0, 2)


def test_a_refused_update_of_the_reference_leaves_the_old_one(engine, models):
    _, reference = models
    sent = [(name, tensor.clone()) for name, tensor in named_tensors(engines.step(fresh_copy(reference), 5))]
    with pytest.raises(WeightUpdateError, match=r"the engine is unchanged: missing: model\.norm\.weight"):
        engine.update_reference([pair for pair in sent if pair[0] != "model.norm.weight"])
    with pytest.raises(WeightUpdateError, match=r"cannot take 'reference\.model\.norm\.weight'"):
        engine.update_reference([*sent, ("reference.model.norm.weight", torch.ones(64))])
    sent[2][1].view(-1)[5] = torch.nan
    with pytest.raises(WeightUpdateError, match="not finite"):
        engine.update_reference(sent)
    assert_samples(engine, models, 0.0, 0.5, 1.0)


def fresh_copy(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_failed_update_of_one_leaves_the_other(engine, models, monkeypatch):
    def broken_off(worker, tensors):
        def half():
            yield from tensors[:9]
            raise OSError("the line went dead")

        return load(worker, half())

    load = in_place.engine_model.load_weights
    with monkeypatch.context() as patch:
        patch.setattr(in_place.engine_model, "load_weights", broken_off)
        with pytest.raises(in_place.LoadFailedError, match="the line went dead"):
            engine.update_reference(named_tensors(models[1]))
    with pytest.raises(RuntimeError, match="last update of the reference failed"):
        engine.generate(requests(0.5), SAMPLING)
    assert engine.version == 3
    assert_samples(engine, models, 0.0)
    engine.update_reference(named_tensors(models[1]))
    assert_samples(engine, models, 0.5)


def test_what_it_refuses(shared, engine):
    with pytest.raises(ValueError, match=r"mixtures 0\.0, 0\.5; .*make a call for each"):
        engine.generate([*requests(0.0), *requests(0.5)], SAMPLING)
    with pytest.raises(ValueError, match=r"mixture=1\.5 is not allowed"):
        engine.generate(requests(1.5), SAMPLING)
    for options, message in (
        (
            {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL"}},
            "'FULL'.*CUDA graphs of the models' pieces alone",
        ),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            start(shared.path, reference=True, engine_kwargs=options)


def test_compiled_code_of_one_model_is_not_taken_for_the_others(engine):
    # vLLM keeps compiled models under such keys, and finds the second under the first's where they are equal.
    model = process.worker_of(engine._llm).model_runner.get_model()
    keys = [decorators()._model_hash_key(part.model.forward) for part in (model.policy, model.reference)]
    assert keys[0] != keys[1]
    assert keys[0] == decorators()._model_hash_key.__wrapped__(model.policy.model.forward)


def decorators():
    return importlib.import_module("vllm.compilation.decorators")
