"""Log-probabilities and entropies from hidden states, a chunk of logits at a time, forward and backward.

Logits are by far the largest tensor of a step: a float32 row of a vocabulary of 150 thousand is 0.6 MB. Here they are
computed for some rows, reduced to three numbers a row, and computed again for the gradient. Only the last chunk's are
kept, since the backward pass begins with it: a micro-batch that fits into one chunk computes nothing twice.

Legend: N rows, R rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits held at a time when nothing else is asked for. Larger chunks make larger products and fewer additions to the
# gradient of the weight; 2**28 of them are half a GiB in bfloat16, and their gradient is as much again.
CHUNK_CUDA = 2**28
CHUNK_CPU = 2**24


@dataclass(frozen=True, slots=True)
class Logits:
    """What becomes of the head's output x before it is a logit: z = cap * tanh(scale * x / cap) / temperature.

    Attributes:
        scale: 1.0 in most models.
        cap: None: no tanh.
        temperature: Of the distribution that tokens were sampled from.
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def of(self, output: Tensor) -> Tensor:
        """z, at least in float32."""
        z = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.cap is not None:
            return (z * (self.scale / self.cap)).tanh() * (self.cap / self.temperature)
        factor = self.scale / self.temperature
        return z if factor == 1.0 else z * factor

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/dx."""
        factor = self.scale / self.temperature
        return factor if self.cap is None else (1 - (z * (self.temperature / self.cap)) ** 2) * factor


def scores(output_RV: Tensor, targets_R: Tensor, logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, entropy, and normalizer (log-sum-exp of the logits), (R,) each."""
    z_RV = logits.of(output_RV)
    normalizer_R = z_RV.logsumexp(dim=-1)
    logps_R = z_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1) - normalizer_R
    entropies_R = normalizer_R - ((z_RV - normalizer_R.unsqueeze(-1)).exp() * z_RV).sum(dim=-1)
    return logps_R, entropies_R, normalizer_R


def score_linear(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    logits: Logits,
    *,
    dtype: torch.dtype,
    entropy_gradient: bool,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (N,) each and at least in float32, under a linear head.

    Args:
        hidden_NH, weight_VH, bias_V, targets_N: The head's input and parameters, and the tokens to be scored.
        logits: What becomes of its output.
        dtype: What products are computed in.
        entropy_gradient: Whether gradients flow through entropies.
        chunk_rows: Rows of logits held at a time; None: as many as the device is good for.
    """
    rows = chunk_rows or _chunk_rows(hidden_NH.device, weight_VH.shape[0])
    return _LinearScores.apply(hidden_NH, weight_VH, bias_V, targets_N, logits, dtype, entropy_gradient, rows)


def score_module(
    forward: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    vocabulary: int,
    targets_N: Tensor,
    logits: Logits,
    *,
    entropy_gradient: bool,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same under a head of any kind, such as one with an adapter: `forward` computes its output."""

    def part(hidden_RH: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        return scores(forward(hidden_RH), targets_R, logits)[:2]

    rows = chunk_rows or _chunk_rows(hidden_NH.device, vocabulary)
    chunks = zip(hidden_NH.split(rows), targets_N.split(rows), strict=True)
    parts = [checkpoint(part, hidden, targets, use_reentrant=False) for hidden, targets in chunks]
    logps_N, entropies_N = (torch.cat(values) for values in zip(*parts, strict=True))
    return logps_N, entropies_N if entropy_gradient else entropies_N.detach()


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        logits: Logits,
        dtype: torch.dtype,
        entropy_gradient: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        score = _compiled(scores, hidden_NH.device.type)
        parts = []
        with torch.autocast(hidden_NH.device.type, enabled=False):
            weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for hidden, targets in zip(hidden_NH.split(rows), targets_N.split(rows), strict=True):
                output = nn.functional.linear(hidden.to(dtype), weight, bias)
                parts.append(score(output, targets, logits))
        logps_N, entropies_N, normalizer_N = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, entropies_N, normalizer_N, output)
        ctx.settings = (logits, dtype, entropy_gradient, rows)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies_N)
        return logps_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_gradient_N: Tensor, entropy_gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, entropies_N, normalizer_N, output = ctx.saved_tensors
        logits, dtype, entropy_gradient, rows = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradient = _compiled(_output_gradient, hidden_NH.device.type)
        precise = torch.promote_types(dtype, torch.float32)
        hidden_gradient = torch.empty_like(hidden_NH) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight_VH, dtype=precise) if wants_weight else None
        bias_gradient = torch.zeros_like(bias_V, dtype=precise) if wants_bias else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
            starts = range(0, len(hidden_NH), rows)
            for start in reversed(starts):
                part = slice(start, start + rows)
                hidden = hidden_NH[part].to(dtype)
                if start != starts[-1]:
                    output = nn.functional.linear(hidden, weight, bias)
                output = gradient(
                    output, targets_N[part], normalizer_N[part], logp_gradient_N[part],
                    entropies_N[part] if entropy_gradient else None, entropy_gradient_N[part], logits,
                )  # fmt: skip
                if hidden_gradient is not None:
                    hidden_gradient[part] = output @ weight
                if weight_gradient is not None:
                    _add_product(weight_gradient, output.T, hidden)
                if bias_gradient is not None:
                    bias_gradient += output.sum(dim=0, dtype=precise)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight_VH.dtype)
        if bias_gradient is not None:
            bias_gradient = bias_gradient.to(bias_V.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, *[None] * 5


def _output_gradient(
    output_RV: Tensor,
    targets_R: Tensor,
    normalizer_R: Tensor,
    logp_gradient_R: Tensor,
    entropies_R: Tensor | None,
    entropy_gradient_R: Tensor,
    logits: Logits,
) -> Tensor:
    """Gradient of the head's output. With p the probabilities and e the entropy,

    d log p_target / dz = 1[target] - p and d e / dz = -p (log p + e).
    """

    def everywhere(x: Tensor) -> tuple[Tensor, Tensor | float]:
        z = logits.of(x)
        log_p = z - normalizer_R.unsqueeze(-1)
        factor = -logp_gradient_R.unsqueeze(-1)
        if entropies_R is not None:
            factor = factor - entropy_gradient_R.unsqueeze(-1) * (log_p + entropies_R.unsqueeze(-1))
        slope = logits.slope(z)
        return log_p.exp() * factor * slope, slope

    at_target_R1 = targets_R.unsqueeze(-1)
    part, slope = everywhere(output_RV.gather(-1, at_target_R1))
    # Added before it is rounded to the head's dtype.
    target_gradient_R1 = part + logp_gradient_R.unsqueeze(-1) * slope
    gradient_RV = everywhere(output_RV)[0].to(output_RV.dtype)
    return gradient_RV.scatter(-1, at_target_R1, target_gradient_R1.to(output_RV.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and total.dtype == torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out"):
        # Added up in float32 by the product itself: no product that is rounded before, and no pass of its own.
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


def _chunk_rows(device: torch.device, vocabulary: int) -> int:
    return max(1, (CHUNK_CUDA if device.type == "cuda" else CHUNK_CPU) // vocabulary)


@lru_cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` with its passes over the logits fused, where that is possible."""
    return torch.compile(function) if device == "cuda" and _compiler_works() else function


@lru_cache
def _compiler_works() -> bool:
    try:
        torch.compile(torch.exp)(torch.zeros(8, device="cuda"))
    except Exception as error:  # noqa: BLE001
        warnings.warn(
            "torch.compile does not work here, so log-probabilities are computed by more and slower kernels: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
