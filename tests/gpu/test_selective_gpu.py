"""Selective checkpointing on an NVIDIA GPU: what a layer keeps there, and kernels that write in place."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from test_training_gpu import GROUPS, PACKED, learn, packer, switch_checkpointing
from test_training_gpu import rollouts as rollouts
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2 import modeling_qwen2

from slipstream.modeling.attention import packed_attention
from slipstream.modeling.logprobs import score_tokens
from slipstream.records import StepTotals

pytestmark = pytest.mark.gpu

WAYS = ("off", "on", "selective")
FLASH = "aten::_flash_attention_forward"


def build(layers=2):
    """In the proportions of a model of 1.5B parameters."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=5000, hidden_size=512, intermediate_size=2986, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).bfloat16().cuda().train()


class Calls(TorchDispatchMode):
    """Counts operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_attention_and_products_are_not_computed_again(rollouts):
    found = {}
    for how in WAYS:
        switch_checkpointing(model := build(), how)
        learn(model, rollouts, PACKED)
        with Calls() as calls:
            gradients = learn(model, rollouts, PACKED)[1]
        found[how] = gradients, calls.made[FLASH], calls.made["aten::mm"] + calls.made["aten::addmm"]
    assert found["selective"][1:] == found["off"][1:]
    assert found["on"][1] == 2 * found["off"][1]
    # Attention's backward pass adds up in any order.
    assert (found["selective"][0] - found["off"][0]).norm() < 0.01 * found["off"][0].norm()


def test_a_layer_keeps_less_than_half(rollouts):
    kept = {}
    for how in WAYS:
        alive = []
        for layers in (1, 3):
            switch_checkpointing(model := build(layers), how)
            learn(model, rollouts, PACKED)  # libraries take memory of their own at first
            (batch,) = packer(**PACKED | {"max_tokens": 9999}).pack(rollouts, StepTotals(len(GROUPS), 1.0, 1))
            before = torch.cuda.memory_allocated()
            with packed_attention(model):
                output = score_tokens(model, model.lm_head, batch, temperature=1.0)
                alive.append(torch.cuda.memory_allocated() - before)
                output.logps_N.sum().backward()
        kept[how] = alive[1] - alive[0]
    assert kept["on"] < kept["selective"] < 0.5 * kept["off"]


def test_ligers_rotary_embedding_writes_in_place(rollouts, monkeypatch):
    rope = pytest.importorskip("liger_kernel.transformers.rope")
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", rope.liger_rotary_pos_emb)
    found = {}
    for how in WAYS:
        switch_checkpointing(model := build(), how)
        found[how] = [learn(model, rollouts, PACKED)[1] for _ in range(2)]
    scale = found["off"][0].norm()
    for gradients in (*found["on"], *found["selective"]):
        assert (gradients - found["off"][0]).norm() < 0.01 * scale
