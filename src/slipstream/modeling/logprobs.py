"""Log-probabilities and entropies of completion tokens under a model.

Legend: B rows, T tokens a row, H hidden size, N completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
        entropies_N: Entropy of the distribution it was drawn from, float32, without gradient; None if not asked for.
    """

    logps_N: Tensor
    entropies_N: Tensor | None


def score_tokens(
    model: nn.Module, head: nn.Module, batch: MicroBatch, *, temperature: float, entropies: bool = False
) -> PolicyOutput:
    """Run `model` once and score the completion tokens of `batch`.

    Args:
        model: The (possibly wrapped) causal language model; it is called as a whole, so that DDP's hooks run.
        head: Its output embedding, which is applied at completion positions alone.
        batch: The rows.
        temperature: Logits are divided by it, as they were when the tokens were sampled.
        entropies: Whether to compute entropies as well.
    """
    with _only_at(head, batch.positions_N):
        # No attention mask: rows are padded on the right, see Packer.
        logits_NV = model(input_ids=batch.input_ids_BT, use_cache=False).logits
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
    return PolicyOutput(logps_N, _entropies(logits_NV.detach(), normalizer_N.detach()) if entropies else None)


def _entropies(logits_NV: Tensor, normalizer_N: Tensor) -> Tensor:
    parts = []
    for logits, normalizer in zip(logits_NV.split(ENTROPY_CHUNK), normalizer_N.split(ENTROPY_CHUNK), strict=True):
        probabilities = (logits - normalizer.unsqueeze(-1)).exp()
        parts.append(normalizer - (probabilities * logits).sum(dim=-1))
    return torch.cat(parts) if parts else normalizer_N


@contextmanager
def _only_at(head: nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Let `head` see the hidden states at `positions_N` of the flattened batch, and no others.

    The output embedding is the largest product and its logits are the largest tensor of a step; prompt and padding
    positions need neither.
    """

    def select(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden_BTH = args[0]
        return (hidden_BTH.flatten(0, -2)[positions_N], *args[1:]), kwargs

    hook = head.register_forward_pre_hook(select, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
