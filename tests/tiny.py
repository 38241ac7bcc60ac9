"""A tiny chat model with random weights that both transformers and vLLM's CPU engine can run (head_dim 32), and a
reward model beside it."""

from __future__ import annotations

import string
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user>' + m['content'] + '<end>' }}"
    "{% elif m['role'] == 'system' %}{{ '<system>' + m['content'] + '<end>' }}"
    "{% else %}{{ '<assistant>' + m['content'] + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIALS = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]


def tokenizer():
    """One token a printable character, and the chat template's markers. `<end>` ends a turn, `<pad>` pads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *sorted(set(string.printable) - set("\t\r\x0b\x0c"))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="?",
        additional_special_tokens=["<user>", "<assistant>", "<system>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = CHAT_TEMPLATE
    return made


def build(path: str | Path, *, seed: int = 0, layers: int = 2, hidden: int = 64, tied: bool = True) -> Path:
    """Save a random Qwen2-shaped model (grouped-query attention, fused qkv with bias) and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocabulary = tokenizer()
    config = Qwen2Config(
        vocab_size=128, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=max(1, hidden // 64), max_position_embeddings=512,
        tie_word_embeddings=tied, eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        # Larger than the usual 0.02, so that distributions are far from uniform and a wrong weight shows.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = vocabulary.eos_token_id
    model.generation_config.pad_token_id = vocabulary.pad_token_id
    model.save_pretrained(path)
    vocabulary.save_pretrained(path)
    return Path(path)


def build_reward_model(path: str | Path) -> Path:
    """Save a random Qwen2-shaped reward model (one label) and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    vocabulary = tokenizer()
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=vocabulary.pad_token_id, num_labels=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForSequenceClassification(config).save_pretrained(path)
    vocabulary.save_pretrained(path)
    return Path(path)
