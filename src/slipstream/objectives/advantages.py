"""From rewards to advantages."""

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
    count = (~values.isnan()).sum(dim=dim)
    spread = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim)
    return torch.where(count > 1, (spread / (count - 1).clamp(min=1)).sqrt(), 0.0)


def group_advantages(rewards_R: Tensor, group_size: int) -> Tensor:
    """GRPO's advantages (https://arxiv.org/abs/2402.03300): (R - mean) / (std + 1e-4) within each group, shape (R,).

    Args:
        rewards_R: Rewards; the `group_size` completions of a prompt stand together. NaN: no reward.
        group_size: Completions of each prompt.

    A row without a reward gets advantage 0 and does not enter its group's mean and standard deviation.
    """
    groups = rewards_R.view(-1, group_size)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    return (centered / (nanstd(groups, dim=1).unsqueeze(1) + STD_FLOOR)).nan_to_num(0.0).view(-1)
