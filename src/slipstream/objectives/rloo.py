"""REINFORCE Leave-One-Out (https://arxiv.org/abs/2402.14740): a whole completion is one action.

Legend: (R,) a value per row of the generation batch, all ranks; (B,) per row of a micro-batch, (N,) per token of one;
see `segments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.objectives.advantages import STD_FLOOR, nanstd
from slipstream.objectives.correction import MAX_LOG_RATIO
from slipstream.objectives.policy import clipped_surrogate
from slipstream.objectives.segments import row_sum


def shaped_rewards(
    rewards_R: Tensor, kl_R: Tensor | None, beta: float, clip_range: tuple[float, float] | None = None
) -> Tensor:
    """Rewards within `clip_range`, less the penalty for leaving the reference: clamp(R) - beta * KL, shape (R,).

    Args:
        rewards_R: NaN: no reward; it stays NaN.
        kl_R: Of each row the sum over its tokens of log old - log reference (the k1 estimate, which can be negative);
            None where beta is 0.
        clip_range: Lowest and highest reward, before the penalty; None: no bounds.
    """
    if clip_range is not None:
        rewards_R = rewards_R.clamp(clip_range[0], clip_range[1])
    return rewards_R if kl_R is None else rewards_R - beta * kl_R


def leave_one_out_advantages(rewards_R: Tensor, group_size: int, normalize: bool = False) -> Tensor:
    """R minus the mean of the other rows of its group, shape (R,).

    Args:
        rewards_R: Rewards; the `group_size` completions of a prompt stand together. NaN: no reward.
        group_size: Completions of each prompt.
        normalize: Then also subtract the mean of all advantages, and divide by their standard deviation + 1e-4.

    A row without a reward gets advantage 0 and enters no mean; so does the only row of its group that has one.
    """
    groups = rewards_R.double().view(-1, group_size)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others.clamp(min=1)
    advantages_R = torch.where(others > 0, groups - baseline, torch.nan).view(-1)
    if normalize:
        advantages_R = (advantages_R - advantages_R.nanmean()) / (nanstd(advantages_R, dim=0) + STD_FLOOR)
    return advantages_R.nan_to_num(0.0).to(rewards_R.dtype)


def sequence_surrogate(
    log_ratio_N: Tensor,
    advantages_B: Tensor,
    mask_N: Tensor,
    rows_N: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped objective on the ratio of whole completions, exp of the sum over a row's tokens, shape (B,).

    Args:
        log_ratio_N: log policy - log old. Differentiable.
        mask_N: 1 for tokens that count.
        weights_N: The sampler correction's weights, constants: each scales the gradient of its own token and leaves
            the ratio, and so the clip and the loss's value, as they are. None: all 1.

    Returns:
        The loss of each row, and as 0/1 where the clip took its gradient away, at the lower bound and at the upper.
    """
    if weights_N is not None:
        constant_N = log_ratio_N.detach()
        log_ratio_N = constant_N + weights_N * (log_ratio_N - constant_N)
    log_ratio_B = row_sum(torch.where(mask_N > 0, log_ratio_N, 0.0), rows_N, len(advantages_B))
    # A ratio of infinity would make NaN out of an advantage of 0.
    return clipped_surrogate(log_ratio_B.clamp(max=MAX_LOG_RATIO).exp(), advantages_B, epsilon_low, epsilon_high)
