"""From rewards to advantages.

Means and deviations are computed in float64: in float32 the mean of equal rewards is not always their value, and the
difference, divided by next to nothing + 1e-4, would be an advantage that no reward has earned.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps a group of nearly equal rewards from being blown up; the value that GRPO implementations share.
STD_FLOOR = 1e-4


def combine_rewards(rewards_RF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum over reward functions, shape (R,).

    NaN marks a function that could not score a row: it is left out of the sum. A row that no function scored is NaN.
    """
    total = (rewards_RF * weights_F).nansum(dim=1)
    return torch.where(rewards_RF.isnan().all(dim=1), torch.nan, total)


def nanstd(values: Tensor, dim: int) -> Tensor:
    """Standard deviation with Bessel's correction over the values that are not NaN; 0 where fewer than two are left."""
    count, precise = (~values.isnan()).sum(dim=dim), values.double()
    spread = (precise - precise.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim)
    return torch.where(count > 1, (spread / (count - 1).clamp(min=1)).sqrt(), 0.0).to(values.dtype)


def group_advantages(rewards_R: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """GRPO's advantages (https://arxiv.org/abs/2402.03300): R minus the mean of its group, scaled, shape (R,).

    Args:
        rewards_R: Rewards; the `group_size` completions of a prompt stand together. NaN: no reward.
        group_size: Completions of each prompt.
        scale: `group` divides by the group's standard deviation + 1e-4, `batch` by that of all rewards
            (https://arxiv.org/abs/2508.08221), `none` by nothing (https://arxiv.org/abs/2503.20783).

    A row without a reward gets advantage 0 and does not enter any mean or standard deviation.
    """
    groups = rewards_R.double().view(-1, group_size)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centered = centered / (nanstd(groups, dim=1).unsqueeze(1) + STD_FLOOR)
    elif scale == "batch":
        centered = centered / (nanstd(rewards_R, dim=0) + STD_FLOOR)
    return centered.nan_to_num(0.0).view(-1).to(rewards_R.dtype)


def decoupled_advantages(rewards_RF: Tensor, weights_F: Tensor, group_size: int) -> Tensor:
    """GDPO's advantages (https://arxiv.org/abs/2601.05242), shape (R,): each reward function is normalized within its
    group before they are summed, then the sum over the batch, so that no function drowns another.

    A row that no function scored gets advantage 0.
    """
    groups = rewards_RF.double().view(-1, group_size, rewards_RF.shape[1])
    normalized = (groups - groups.nanmean(dim=1, keepdim=True)) / (nanstd(groups, dim=1).unsqueeze(1) + STD_FLOOR)
    total_R = combine_rewards(normalized.view_as(rewards_RF), weights_F)
    advantages_R = (total_R - total_R.nanmean()) / (nanstd(total_R, dim=0) + STD_FLOOR)
    return advantages_R.nan_to_num(0.0).to(rewards_RF.dtype)
