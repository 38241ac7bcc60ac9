"""What an engine with a reference needs, without starting one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import tiny
from torch import nn

from slipstream.generation.engine import Request
from slipstream.generation.requests import mixture_of
from slipstream.generation.vllm_options import cpu_cache_bytes
from slipstream.vllm_compat import REFERENCE_OPTION, mixture


def asking(*shares):
    return [Request([5], mixture=share) for share in shares]


def test_a_call_has_one_mixture():
    assert mixture_of([], has_reference=False) == 0.0
    assert mixture_of(asking(0.0, 0.0), has_reference=False) == 0.0
    assert mixture_of(asking(0.3, 0.3), has_reference=True) == 0.3
    with pytest.raises(ValueError, match=r"have mixtures 0\.0, 0\.3, 1\.0;"):
        mixture_of(asking(0.3, 0.0, 1.0), has_reference=True)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="is not allowed: a number from 0"):
            mixture_of(asking(share), has_reference=True)
    with pytest.raises(ValueError, match=r"mixture=1\.0 .*give `reference` to build_engine, or set mixture=0"):
        mixture_of(asking(1.0), has_reference=False)


def test_a_token_takes_twice_the_cache(tmp_path):
    options = {"model": str(tiny.build(tmp_path)), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
    alone = cpu_cache_bytes(options)
    assert cpu_cache_bytes(options | {"additional_config": {"other": 1}}) == alone
    assert cpu_cache_bytes(options | {"additional_config": {REFERENCE_OPTION: True}}) == 2 * alone


@pytest.mark.parametrize("name", ["embed_input_ids", "forward", "compute_logits"])
def test_vllm_takes_it_for_a_text_model(name):
    # From Python 3.12 on isinstance() with vLLM's protocol asks the class, not `__getattr__`.
    assert callable(inspect.getattr_static(mixture.MixtureModel, name))


def config(layers=(), multimodal=False, stages=1):
    return SimpleNamespace(
        model_config=SimpleNamespace(is_multimodal_model=multimodal, model="some/model"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        compilation_config=SimpleNamespace(static_forward_context=dict(layers)),
    )


def layer(target=None):
    return SimpleNamespace(kv_sharing_target_layer_name=target)


@pytest.mark.parametrize(
    "layers",
    [
        {"a.0": layer(), "b.1": layer()},
        {"a.0": layer(), "reference.a.0": layer(), "reference.a.1": layer()},
        {"a.0": layer(), "a.1": layer("a.0"), "reference.a.0": layer(), "reference.a.1": layer("a.0")},
    ],
    ids=["unnamed", "uneven", "shared"],
)
def test_models_that_would_share_keys_and_values_are_refused(layers):
    with pytest.raises(NotImplementedError, match=r"cannot sample with a reference .*Set use_vllm=False"):
        mixture.MixtureModel(vllm_config=config(layers), build=lambda prefix: nn.Linear(1, 1))


def test_models_that_keep_their_names_are_taken():
    layers = {"a.0": layer(), "a.1": layer("a.0"), "reference.a.0": layer(), "reference.a.1": layer("reference.a.0")}
    prefixes = []
    made = mixture.MixtureModel(vllm_config=config(layers), build=lambda p: prefixes.append(p) or nn.Linear(1, 1))
    assert prefixes == ["", "reference"]
    assert made.policy is not made.reference


def test_other_models_are_refused():
    with pytest.raises(NotImplementedError, match=r"some/model: .*text models only"):
        mixture.MixtureModel(vllm_config=config(multimodal=True), build=nn.Identity)
    with pytest.raises(NotImplementedError, match="pipeline stages"):
        mixture.MixtureModel(vllm_config=config(stages=2), build=nn.Identity)


def test_an_engine_without_reference_has_no_such_part():
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: nn.Linear(1, 1)))
    assert mixture.part(worker, mixture.POLICY) is worker
    with pytest.raises(ValueError, match="made without a reference model"):
        mixture.part(worker, mixture.REFERENCE)
