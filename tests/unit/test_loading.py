"""What is loaded beside a model's weights, and what an engine is told of its shape."""

from __future__ import annotations

import pytest
import tiny
import tiny_vision
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slipstream import GRPOConfig
from slipstream.generation.build import _save_shape
from slipstream.trainers import loading


def test_an_engine_is_told_the_class_that_transformers_has(tmp_path):
    """Where a model was never loaded, and somebody has derived its class (FSDP2 does): vLLM knows the base alone."""

    class Derived(LlamaForCausalLM):
        pass

    words = tiny.tokenizer()
    for name, kind in (("own", LlamaForCausalLM), ("derived", Derived)):
        model = kind(LlamaConfig(vocab_size=160, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
        folder = _save_shape(model, words, tmp_path / name)
        assert AutoConfig.from_pretrained(folder).architectures == ["LlamaForCausalLM"]


def test_a_processor_that_cannot_be_made_is_not_missed_by_text(tmp_path):
    """Somebody trained a model that could see on text, and saved a tokenizer without the names of images' tokens."""
    model, processor = tiny_vision.gemma3()
    for made in (model, processor, tiny.tokenizer()):
        made.save_pretrained(tmp_path)
    args = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    assert len(loading.load_tokenizer(None, str(tmp_path), args)) == len(tiny.tokenizer())
    with pytest.raises(ValueError, match=r"no processor, which prompts with images need, .* can be loaded.*boi_token"):
        loading.load_tokenizer(None, str(tmp_path), args, images=True)


def test_a_folder_with_an_adapter_alone_is_a_model(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    args = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    assert loading.load_tokenizer(None, str(tmp_path), args).eos_token
    assert any("lora" in name for name, _ in loading.load_policy(str(tmp_path), args).named_parameters())
