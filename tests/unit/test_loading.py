"""What is loaded beside a model's weights, and what an engine is told of its shape."""

from __future__ import annotations

import tiny
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from slipstream.generation.build import _save_shape


def test_an_engine_is_told_the_class_that_transformers_has(tmp_path):
    """Of a model that was never loaded, and whose class somebody has derived (FSDP2 does): vLLM knows the base alone."""

    class Derived(LlamaForCausalLM):
        pass

    words = tiny.tokenizer()
    for name, kind in (("own", LlamaForCausalLM), ("derived", Derived)):
        model = kind(LlamaConfig(vocab_size=160, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
        folder = _save_shape(model, words, tmp_path / name)
        assert AutoConfig.from_pretrained(folder).architectures == ["LlamaForCausalLM"]
