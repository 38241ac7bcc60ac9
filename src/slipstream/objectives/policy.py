"""Losses of a policy on its own tokens. Shapes: (N,) a value per completion token, (B,) a value per row."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped objective (https://arxiv.org/abs/1707.06347) as a loss per token.

    Args:
        delta: Largest ratio, also where A < 0, which the clip leaves unbounded (https://arxiv.org/abs/2505.07291).

    Returns:
        The loss -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), and where the clip took the gradient away: at
        the lower bound (A < 0) and at the upper bound (A > 0), as 0/1.
    """
    clipped_N = ratio_N.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    loss_N = -torch.min(bounded_N * advantages_N, clipped_N * advantages_N)
    low_N = ((ratio_N < 1 - epsilon_low) & (advantages_N < 0)).to(ratio_N.dtype)
    high_N = ((ratio_N > 1 + epsilon_high) & (advantages_N > 0)).to(ratio_N.dtype)
    return loss_N, low_N, high_N


def kl_k3(logps_N: Tensor, ref_logps_N: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token, exp(q) - q - 1 with q = ref - policy; never negative.

    http://joschu.net/blog/kl-approx.html
    """
    difference_N = ref_logps_N - logps_N
    return difference_N.exp() - difference_N - 1
