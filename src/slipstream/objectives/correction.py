"""Correcting for a sampler whose probabilities differ from the trainer's (other kernels, other precision).

The engine that sampled and the model that is trained hold the same weights and still disagree a little. Truncated
importance sampling (https://fengyao.notion.site/off-policy-rl) weights the loss by their ratio, within bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.objectives.segments import row_sum

# exp of more than this is infinity in float32; a ratio that large is out of any bound anyway.
MAX_LOG_RATIO = 80.0


@dataclass(frozen=True, slots=True)
class Correction:
    """Weights of the loss, and what they were made of.

    Attributes:
        weights_N: Factor of each token's loss; a constant with regard to the parameters.
        ratios: Raw ratios before the bounds, shape (N,) for token modes and (B,) for sequence modes.
        changed: 1 where a bound changed the ratio, same shape as `ratios`.
        counts: 1 where a ratio stands for at least one token of the mask, same shape as `ratios`.
    """

    weights_N: Tensor
    ratios: Tensor
    changed: Tensor
    counts: Tensor


def sampler_correction(
    trainer_logps_N: Tensor,
    sampler_logps_N: Tensor,
    mask_N: Tensor,
    rows_N: Tensor,
    rows: int,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Correction:
    """Importance weights trainer / sampler for each token.

    Args:
        trainer_logps_N: Log-probabilities under the trainer's weights that the tokens were sampled with.
        sampler_logps_N: What the engine reported when it sampled them.
        mask_N: 1 for tokens that count; the others have ratio 1, whatever their log-probabilities are.
        mode: `token_*` weights each token by its own ratio, `sequence_*` by the product over its row,
            `sequence_geometric_*` by the geometric mean over its row; `*_truncate` clamps the ratio to the bounds,
            `*_mask` drops what lies outside.
        clip_min, clip_max: The bounds; None is no bound.
    """
    delta_N = torch.where(mask_N > 0, trainer_logps_N - sampler_logps_N, 0.0).detach()
    level, _, action = mode.rpartition("_")
    if level == "token":
        log_ratios, counts = delta_N, mask_N
    else:
        lengths = row_sum(mask_N, rows_N, rows)
        log_ratios, counts = row_sum(delta_N, rows_N, rows), (lengths > 0).to(mask_N.dtype)
        if level == "sequence_geometric":
            log_ratios = log_ratios / lengths.clamp(min=1.0)
    ratios = log_ratios.clamp(max=MAX_LOG_RATIO).exp()
    low = 0.0 if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    outside = (ratios < low) | (ratios > high)
    weights = ratios.clamp(low, high) if action == "truncate" else torch.where(outside, 0.0, ratios)
    return Correction(weights if level == "token" else weights[rows_N], ratios, outside.to(ratios.dtype), counts)
