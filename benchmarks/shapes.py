"""Models of known shapes with random weights, for measurements."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "model"
SHAPES: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "qwen2-1.5b": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "qwen2-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
}  # fmt: skip


def save(shape: str, folder: Path, dtype: torch.dtype, *, end_every: float | None = None) -> Path:
    """Save a model of this shape, and a chat tokenizer in which every token id of its vocabulary has a text.

    Args:
        end_every: How many tokens a completion has on average, if nothing cuts it off: random weights sample nearly
            uniformly, so as many tokens of the vocabulary end one as makes that. None: the tokenizer's alone.
    """
    config, tokenizer = _config(shape)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a device that is quicker with it
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    ends = tokenizer.eos_token_id
    if end_every is not None:
        last = config.vocab_size
        ends = [ends, *range(last - round(last / end_every), last)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder, config.vocab_size)
    return folder


def save_config(shape: str, folder: Path) -> PretrainedConfig:
    """Save a model without weights, for engines that are told to make them up."""
    config, tokenizer = _config(shape)
    config.architectures = ["Qwen2ForCausalLM" if isinstance(config, Qwen2Config) else "LlamaForCausalLM"]
    config.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder, config.vocab_size)
    return config


def _config(shape: str) -> tuple[PretrainedConfig, Any]:
    config, tokenizer = copy.deepcopy(SHAPES[shape]), AutoTokenizer.from_pretrained(QUICKSTART)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    return config, tokenizer


def _save_tokenizer(tokenizer: Any, folder: Path, vocab_size: int) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"w{i} ": i for i in range(len(vocabulary), vocab_size)}
    path.write_text(json.dumps(content))
