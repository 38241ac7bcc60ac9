"""Tiny vision-language models with random weights and their processors, made without a hub and without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

# Contents may be strings or lists of parts, as in the templates of real models.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '@IMAGE@' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (24, 24)) -> Any:
    """An image with one color on its left half and noise of that color on its right."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng([*color, *size])
    pixels = np.empty((size[1], size[0], 3), dtype=np.uint8)
    pixels[:] = color
    pixels[:, size[0] // 2 :] = random.integers(0, 255, pixels[:, size[0] // 2 :].shape)
    return Image.fromarray(pixels)


def tokenizer(specials: list[str], image: str) -> Any:
    """The tiny tokenizer, with further special tokens and a template in which `image` stands for an image."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>", *specials]})
    made.chat_template = CHAT_TEMPLATE.replace("@IMAGE@", image)
    return made


def _randomized(model: Any, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    for parameter in model.parameters():
        # Far from uniform, so that a wrong weight or picture shows.
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)


def _save(model: Any, processor: Any, path: str | Path) -> Path:
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def build_idefics3(path: str | Path, *, seed: int = 0, split: bool = True) -> Path:
    """Save a random Idefics3 (a Llama that sees) and its processor; `split` cuts large images into several."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    specials = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    specials += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer(specials, "<image>")
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 24}, do_image_splitting=split
    )
    processor = Idefics3Processor(images, words, image_seq_len=4, chat_template=words.chat_template)
    text = LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    config = Idefics3Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 24, "patch_size": 6, "max_image_size": {"longest_edge": 24}, "size": {"longest_edge": 48},
        },
        scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = Idefics3ForConditionalGeneration(config)
        _randomized(model, seed)
    return _save(model, processor, path)


def qwen2_5_vl(seed: int = 0) -> tuple[Any, Any]:
    """A random Qwen2.5-VL, whose positions have three dimensions, and its processor.

    The processor lacks videos, which need torchvision, and so cannot be loaded from a folder.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    specials = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(specials, "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 24 * 24}
    )

    class Processor(Qwen2_5_VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    processor = Processor(images, words, None, chat_template=words.chat_template)
    ids = {name: words.convert_tokens_to_ids(name) for name in specials}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = Qwen2_5_VLForConditionalGeneration(config)
        _randomized(model, seed)
    return model, processor


# Of these a vision tower and a language model that many others have, too.
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24,
    "patch_size": 6,
}  # fmt: skip
TEXT = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip


def llava(seed: int = 0) -> tuple[Any, Any]:
    """A random LLaVA and its processor."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer(["<image>"], "<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images, words, patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
        text_config={"model_type": "llama", **TEXT}, image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    with torch.random.fork_rng():
        model = LlavaForConditionalGeneration(config)
        _randomized(model, seed)
    return model, processor


def gemma3(seed: int = 0) -> tuple[Any, Any]:
    """A random Gemma 3, which sees all tokens of an image from each of them, and its processor."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"boi": "<start_of_image>", "image": "<image_soft_token>", "eoi": "<end_of_image>"}
    words = tokenizer(list(names.values()), names["boi"])
    ids = {f"{kind}_token_id": words.convert_tokens_to_ids(name) for kind, name in names.items()}
    for kind, name in names.items():
        setattr(words, f"{kind}_token", name)
        setattr(words, f"{kind}_token_id", ids[f"{kind}_token_id"])
    images = Gemma3ImageProcessorPil(size={"height": 24, "width": 24})
    processor = Gemma3Processor(images, words, chat_template=words.chat_template, image_seq_length=4)
    config = Gemma3Config(
        vision_config=VISION, text_config={**TEXT, "head_dim": 32, "sliding_window": 16}, mm_tokens_per_image=4, **ids
    )
    with torch.random.fork_rng():
        model = Gemma3ForConditionalGeneration(config)
        _randomized(model, seed)
    return model, processor
