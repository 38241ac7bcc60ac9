"""Names and values of exported weights, against what a checkpoint of the same model holds."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.trainers.loading import check_adapter
from slipstream.weights.export import named_tensors, unwrap


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def untied(tiny_model_untied):
    return AutoModelForCausalLM.from_pretrained(tiny_model_untied, dtype=torch.float32)


@pytest.fixture
def group(tmp_path):
    """A gloo process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_same(exported, expected):
    exported = list(exported)
    assert len(exported) == len(expected)
    for name, tensor in exported:
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_names_and_values_are_the_checkpoints(model, untied, tiny_model, tiny_model_untied):
    assert_same(named_tensors(model), load_file(tiny_model / "model.safetensors"))
    assert_same(named_tensors(untied), load_file(tiny_model_untied / "model.safetensors"))


def test_tensors_are_the_weights_themselves_without_gradients(model):
    exported = dict(named_tensors(model))
    assert exported["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in exported.values())
    assert torch.is_grad_enabled()


def test_wrappers_leave_no_trace_in_names(model, group):
    expected = {name: tensor.clone() for name, tensor in named_tensors(model)}
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model))
    assert unwrap(wrapped) is model
    assert_same(named_tensors(wrapped), expected)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert_same(named_tensors(torch.compile(model)), expected)


def test_sharded_weights_come_whole(model, group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    expected = {name: tensor.clone() for name, tensor in named_tensors(model)}
    with pytest.raises(NotImplementedError, match="fsdp_version: 2"):
        list(named_tensors(FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert type(model.model.norm.weight).__name__ == "DTensor" or isinstance(
        model.model.norm.weight.data, torch.distributed.tensor.DTensor
    )
    assert_same(named_tensors(model), expected)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "lora_bias": False, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    ],
    ids=["all-linear", "rslora", "dora", "some", "bias", "modules-to-save", "embeddings"],
)
def test_merged_adapters_equal_merge_and_unload_of_a_copy(untied, tiny_model_untied, options):
    model = lora(untied, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.25)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = [(name, tensor.clone()) for name, tensor in named_tensors(model)]
    checkpoint = load_file(tiny_model_untied / "model.safetensors")
    assert [name for name, _ in exported] == [name for name, _ in named_tensors(
        AutoModelForCausalLM.from_pretrained(tiny_model_untied)
    )]  # fmt: skip
    assert any(not torch.equal(tensor, checkpoint[name]) for name, tensor in exported)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed by the export"
    assert_same(exported, dict(copy.deepcopy(model).merge_and_unload().named_parameters()))


def test_an_adapter_merged_by_hand_is_not_added_twice(untied):
    model = lora(untied)
    expected = {name: tensor.clone() for name, tensor in named_tensors(model)}
    model.merge_adapter()
    for name, tensor in named_tensors(model):
        torch.testing.assert_close(tensor, expected[name])
    assert_same(named_tensors(copy.deepcopy(model)), {n: t.clone() for n, t in named_tensors(model)})


def test_only_the_active_adapter_counts(untied):
    peft = pytest.importorskip("peft")
    model = lora(untied, target_modules=["q_proj"])
    first = {name: tensor.clone() for name, tensor in named_tensors(model)}
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    assert_same(named_tensors(model), first)
    model.set_adapter("other")
    second = dict(named_tensors(model))
    v, q = (f"model.layers.0.self_attn.{name}.weight" for name in ("v_proj", "q_proj"))
    assert not torch.equal(second[v], first[v])
    assert torch.equal(second[q], model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight)


def test_layouts_that_cannot_be_exported_say_so(model, untied):
    peft = pytest.importorskip("peft")
    for options in (
        {"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="embeddings are tied"):
            list(named_tensors(lora(copy.deepcopy(model), **options)))
        # transformers' own integration leaves the model as it is: no model of PEFT's is around it.
        plain = copy.deepcopy(model)
        plain.add_adapter(peft.LoraConfig(init_lora_weights=False, **{"target_modules": ["q_proj"]} | options))
        with pytest.raises(NotImplementedError, match="embeddings are tied"):
            list(named_tensors(plain))
    for kind in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(NotImplementedError, match=rf"peft_config is a {kind.__name__}: .* use LoRA"):
            check_adapter(untied, config)
        prompt = peft.get_peft_model(copy.deepcopy(untied), config)
        with pytest.raises(NotImplementedError, match=rf"does not know adapters of type {kind.__name__}.*use LoRA"):
            list(named_tensors(prompt))
    ia3 = peft.get_peft_model(copy.deepcopy(untied), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(NotImplementedError, match=r"self_attn\.k_proj: adapters of type .* Use LoRA"):
        list(named_tensors(ia3))
    quantized = copy.deepcopy(untied)
    quantized.lm_head.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"lm_head\.weight is stored as torch\.uint8"):
        list(named_tensors(quantized))
    untied.model.norm.weight.ds_id = 3
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        list(named_tensors(untied))


def test_names_that_transformers_changed_are_changed_back(tmp_path):
    """Mixture-of-experts models keep their experts fused in memory and apart in checkpoints."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert os.path.exists(tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert any(".experts.3." in name for name in saved)
    assert_same(named_tensors(model), saved)


def with_buffers(kind):
    """A tiny model of this type with buffers that its checkpoints hold, all of them random."""
    shape = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
    shape |= {
        "glm4_moe": {
            "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, **experts,
        },
        "lfm2_moe": {
            "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
            "use_expert_bias": True, **experts,
        },
        "gemma4_text": {
            "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        },
        "apertus": {"hidden_act": "xielu"},
    }[kind]  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.randn_like(buffer))
    return model


@pytest.mark.parametrize(
    ("kind", "buffer"),
    [
        ("glm4_moe", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("lfm2_moe", "model.layers.1.feed_forward.expert_bias"),
        ("gemma4_text", "model.layers.1.layer_scalar"),
        ("apertus", "model.layers.1.mlp.act_fn.beta"),
    ],
)
def test_buffers_that_checkpoints_hold_are_exported(kind, buffer, tmp_path, group):
    from torch.distributed.fsdp import fully_shard

    model = with_buffers(kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert buffer in saved
    assert_same(named_tensors(model), saved)
    adapted = lora(copy.deepcopy(model), target_modules=["q_proj"])
    with adapted.disable_adapter():
        assert_same(named_tensors(adapted), saved)
    assert torch.equal(dict(named_tensors(adapted))[buffer], saved[buffer])
    for layer in model.model.layers:
        fully_shard(layer)
    assert_same(named_tensors(fully_shard(model)), saved)


def test_a_layer_with_lora_keeps_its_buffers(untied):
    untied.lm_head.register_buffer("scale", torch.tensor([2.0]))
    untied.lm_head.register_buffer("table", torch.ones(3), persistent=False)
    untied.lm_head.register_buffer("count", torch.tensor([2]))
    exported = dict(named_tensors(lora(untied, target_modules=["lm_head"])))
    assert torch.equal(exported["lm_head.scale"], torch.tensor([2.0]))
    assert not exported.keys() & {"lm_head.table", "lm_head.count"}
