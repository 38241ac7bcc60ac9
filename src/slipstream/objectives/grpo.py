"""GRPO's losses: what a token costs under each `loss_type`, and how tokens become one number.

Legend: (N,) a value per completion token, (B,) a value per row; see `segments`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slipstream.objectives.segments import row_mean, row_sum
from slipstream.records import StepTotals

CLIPPED = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LOWEST_LOG_WEIGHT = math.log(1e-8)
HIGHEST_LOG_WEIGHT = 20.0


def log_weights(log_ratio_N: Tensor, mask_N: Tensor, rows_N: Tensor, rows: int, level: str) -> Tensor:
    """Log importance weights, shape (N,): the tokens' own (`token`), or their row's mean (`sequence`).

    The latter is GSPO's (https://arxiv.org/abs/2507.18071). Differentiable.
    """
    if level == "token":
        return log_ratio_N
    return row_mean(log_ratio_N, mask_N, rows_N, rows)[rows_N]


def cispo(ratio_N: Tensor, advantages_N: Tensor, logps_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """CISPO (https://arxiv.org/abs/2506.13585): the ratio, capped, weights the log-probability without a gradient of
    its own. Returns the loss, and where the cap held, as 0/1."""
    loss_N = -ratio_N.clamp(max=cap).detach() * advantages_N * logps_N
    return loss_N, ((ratio_N > cap) & (advantages_N > 0)).to(ratio_N.dtype)


def sapo(ratio_N: Tensor, advantages_N: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """SAPO (https://arxiv.org/abs/2511.20347): a sigmoid gate in the place of the clip, steeper for A <= 0."""
    temperature_N = _either(advantages_N > 0, temperature_pos, temperature_neg, advantages_N.dtype)
    return -(4 / temperature_N) * torch.sigmoid(temperature_N * (ratio_N - 1)) * advantages_N


def _either(condition: Tensor, yes: float, no: float, dtype: torch.dtype) -> Tensor:
    """`yes` where the condition holds, else `no`, in `dtype`: torch.where would round both to the default type."""
    return condition.to(dtype) * (yes - no) + no


@torch.no_grad()
def vespo_weights(
    log_ratio_N: Tensor,
    correction_N: Tensor | None,
    advantages_B: Tensor,
    mask_N: Tensor,
    rows_N: Tensor,
    *,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Tensor:
    """VESPO's weight of each row, shape (B,): phi = exp(lambda + k log w - lambda w), which is 1 at w = 1.

    w is the product of the row's ratios, policy to old and old to sampler.

    Args:
        log_ratio_N: log policy - log old.
        correction_N: The sampler correction's token weights, or None.
        positive, negative: (k, lambda) of rows with A >= 0 and with A < 0.
    """
    rows = len(advantages_B)
    log_w_B = row_sum(log_ratio_N.clamp(-20.0, 20.0) * mask_N, rows_N, rows)
    if correction_N is not None:
        bounded_N = correction_N.log().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
        log_w_B = log_w_B + row_sum(bounded_N * mask_N, rows_N, rows)
    log_w_B = log_w_B.clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
    k_B = _either(advantages_B >= 0, positive[0], negative[0], log_w_B.dtype)
    lambda_B = _either(advantages_B >= 0, positive[1], negative[1], log_w_B.dtype).clamp(min=1e-4)
    return (lambda_B + k_B * log_w_B - lambda_B * log_w_B.exp()).exp()


@torch.no_grad()
def off_policy_mask(
    logps_N: Tensor, sampled_N: Tensor, advantages_B: Tensor, mask_N: Tensor, rows_N: Tensor, threshold: float
) -> Tensor:
    """1 for rows to keep, shape (B,): those with A >= 0, and those that the policy has not moved away from.

    A row with A < 0 is dropped when the mean of log sampled - log policy over its tokens is above `threshold`
    (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556).
    """
    drift_N = (sampled_N - logps_N).nan_to_num(nan=0.0)
    drift_B = row_mean(drift_N, mask_N, rows_N, len(advantages_B))
    return ((advantages_B >= 0) | (drift_B <= threshold)).to(logps_N.dtype)


def aggregate(
    loss_type: str, loss_N: Tensor, mask_N: Tensor, rows_N: Tensor, totals: StepTotals, rows: int, longest: int
) -> Tensor:
    """This micro-batch's part of the loss of its optimizer step; the parts of all micro-batches and ranks add up.

    Gradients are averaged over ranks afterwards, which the factor `totals.ranks` makes up for.

    Args:
        loss_type: `grpo` and `sapo` take the mean of the rows' means, `luspo` of the rows' sums; `dr_grpo` divides by
            rows times `longest` (max_completion_length); the others take the mean of all tokens.
    """
    if loss_type in ("grpo", "sapo"):
        return row_mean(loss_N, mask_N, rows_N, rows).sum() * totals.ranks / totals.rows
    total = (loss_N * mask_N).sum() * totals.ranks
    if loss_type == "luspo":
        return total / totals.rows
    return total / (totals.rows * longest if loss_type == "dr_grpo" else totals.tokens)
