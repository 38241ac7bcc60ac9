"""LongRoPE as engines compute it: one set of factors for every row, whatever its length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def settle_long_rope(model: nn.Module, longest: int) -> bool:
    """Let a model with LongRoPE (https://arxiv.org/abs/2402.13753) compute as a vLLM engine of that length does.

    It has factors for texts up to its original length, and others for longer ones. transformers chooses by the longest
    row of a batch, so that a row's log-probabilities would depend on its neighbours. vLLM takes the long ones for all
    rows if the engine's longest may be that long.

    Args:
        model: The model; what it saves stays the same.
        longest: Tokens of the engine's longest row.

    Returns:
        Whether the model takes its long factors from now on.
    """
    settled = False
    for module, prefix, layer_type in _long_ropes(model):
        parameters = module.config.rope_parameters
        original = (parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"]
        if longest <= original:
            continue
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        present = getattr(module, f"{prefix}inv_freq")
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, present.device, seq_len=original + 1, **kwargs)
        setattr(module, f"{prefix}inv_freq", frequencies)
        # Those that it would return to for short rows.
        setattr(module, f"{prefix}original_inv_freq", frequencies.clone())
        settled = True
    return settled


def original_length(config: Any) -> int | None:
    """Tokens of the longest text that a model with LongRoPE reads with its short factors; None: it has no LongRoPE."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    found = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(found, default=None)


def _long_ropes(model: nn.Module) -> Iterator[tuple[Any, str, str | None]]:
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "longrope":
            yield module, "", None
        elif isinstance(kind, dict):
            yield from ((module, f"{name}_", name) for name, one in kind.items() if one == "longrope")
