"""Log-probabilities and entropies of completion tokens under a model.

Legend: B rows, T tokens a row, H hidden size, N completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slipstream.records import MicroBatch

# Rows of logits whose softmax is held at a time for the entropy, which needs no gradient.
ENTROPY_CHUNK = 1024


@dataclass(slots=True)
class PolicyOutput:
    """What a model says about the completion tokens of a micro-batch.

    Attributes:
        logps_N: Log-probability of each completion token, float32, differentiable.
        entropies_N: Entropy of the distribution it was drawn from, float32; None if not asked for. Without gradient,
            unless that was asked for.
        router_loss: The load balancing loss of a mixture of experts, if it was asked for.
    """

    logps_N: Tensor
    entropies_N: Tensor | None
    router_loss: Tensor | None = None


def score_tokens(
    model: nn.Module,
    head: nn.Module,
    batch: MicroBatch,
    *,
    temperature: float,
    entropies: bool = False,
    entropy_gradient: bool = False,
    router_loss: bool = False,
    float32_head: bool = False,
) -> PolicyOutput:
    """Run `model` once and score the completion tokens of `batch`.

    Args:
        model: The (possibly wrapped) causal language model; it is called as a whole, so that DDP's hooks run.
        head: Its output embedding, which is applied at completion positions alone.
        batch: The rows.
        temperature: Logits are divided by it, as they were when the tokens were sampled.
        entropies: Whether to compute entropies as well.
        entropy_gradient: Whether gradients flow through them.
        router_loss: Whether to compute the load balancing loss of a mixture of experts.
        float32_head: Whether to compute the logits in float32, whatever the model computes in.
    """
    # Rows are padded on the right (see Packer), so that no real token sees the padding: attention needs no mask.
    options: dict[str, Any] = {"use_cache": False}
    if router_loss:
        # The experts do see it, and padding must not count in their balance.
        options |= {"output_router_logits": True, "attention_mask": batch.attention_mask_BT}
    with _only_at(head, batch.positions_N, float32_head):
        answer = model(input_ids=batch.input_ids_BT, **options)
    logits_NV = answer.logits
    if logits_NV.shape[:-1] != batch.positions_N.shape:
        raise RuntimeError(
            f"the model returned logits of shape {tuple(logits_NV.shape)} where {len(batch.positions_N)} rows were "
            f"expected: {type(model).__name__} does not compute them through its output embedding "
            f"{type(head).__name__}, so it cannot be trained here."
        )
    logits_NV = logits_NV.float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    normalizer_N = logits_NV.logsumexp(dim=-1)
    logps_N = logits_NV.gather(-1, batch.targets_N.unsqueeze(-1)).squeeze(-1) - normalizer_N
    balance = answer.aux_loss if router_loss else None
    if not entropies:
        return PolicyOutput(logps_N, None, balance)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        return PolicyOutput(logps_N, _entropies(logits_NV, normalizer_N), balance)


def _entropies(logits_NV: Tensor, normalizer_N: Tensor) -> Tensor:
    parts = []
    for logits, normalizer in zip(logits_NV.split(ENTROPY_CHUNK), normalizer_N.split(ENTROPY_CHUNK), strict=True):
        probabilities = (logits - normalizer.unsqueeze(-1)).exp()
        parts.append(normalizer - (probabilities * logits).sum(dim=-1))
    return torch.cat(parts) if parts else normalizer_N


@contextmanager
def _only_at(head: nn.Module, positions_N: Tensor, float32: bool) -> Iterator[None]:
    """Let `head` see the hidden states at `positions_N` of the flattened batch, and no others.

    The output embedding is the largest product and its logits are the largest tensor of a step; prompt and padding
    positions need neither.
    """

    def select(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden_BTH = args[0]
        return (hidden_BTH.flatten(0, -2)[positions_N], *args[1:]), kwargs

    def precisely(hidden_NH: Tensor) -> Tensor:
        weight, bias = cast(Tensor, head.weight), cast("Tensor | None", getattr(head, "bias", None))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return nn.functional.linear(hidden_NH.float(), weight.float(), None if bias is None else bias.float())

    if float32 and hasattr(head, "base_layer"):
        raise ValueError(
            "cast_lm_head_to_fp32=True does not go with an adapter on the output embedding, which it would leave out: "
            "take lm_head out of target_modules, or set cast_lm_head_to_fp32=False."
        )
    hook = head.register_forward_pre_hook(select, with_kwargs=True)
    forward = head.forward
    if float32:
        head.forward = precisely
    try:
        yield
    finally:
        hook.remove()
        head.forward = forward
