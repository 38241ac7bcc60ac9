"""Sequence-classification models as reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slipstream.records import Rollout
from slipstream.rollouts.prompts import is_conversational


def load_reward(function: Any, tokenizer: Any, device: torch.device) -> tuple[Any, Any]:
    """Resolve one entry of `reward_funcs`: a name loads a sequence-classification model and its tokenizer.

    Raises:
        OSError: nothing of that name can be loaded.
        ValueError: the model has no trained head, or no weights at all.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if isinstance(function, str):
        name = function
        try:
            function, found = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, output_loading_info=True
            )
        except OSError as error:
            raise OSError(
                f"reward_funcs holds {name!r}, and no sequence-classification model of that folder or name can be "
                f"loaded ({error}). Give a folder that save_pretrained has written, or a model's name on the hub."
            ) from error
        if found["missing_keys"]:
            raise ValueError(
                f"reward_funcs holds {name!r}, which has no weights for {', '.join(sorted(found['missing_keys']))}: "
                "it is not a trained reward model, and what is missing would be random. Give a sequence-classification "
                "model, or a function."
            )
    if isinstance(function, nn.Module):
        if not any(bool(p.any()) for p in function.parameters()):
            raise ValueError(
                f"reward_funcs: all weights of the {type(function).__name__} are 0. With FSDP's "
                "cpu_ram_efficient_loading, from_pretrained loads them on one rank alone: pass the model's name, which "
                "every rank loads, or set it to false."
            )
        config: Any = function.config
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(config._name_or_path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
        return function.to(device).eval(), tokenizer
    return function, None


@torch.inference_mode()
def score_with_model(
    model: nn.Module, tokenizer: Any, rollouts: Sequence[Rollout], batch_size: int = 32
) -> list[float]:
    """Logit 0 of each rollout's prompt and completion, `batch_size` of them at a time."""
    texts = []
    for rollout in rollouts:
        prompt, text = rollout.prompt.row["prompt"], rollout.text
        if is_conversational(prompt):
            texts.append(tokenizer.apply_chat_template([*prompt, *text], tokenize=False))
        else:
            texts.append(f"{prompt}{text}")
    scores: list[float] = []
    device = next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        scores += model(**inputs.to(device)).logits[:, 0].float().tolist()
    return scores
