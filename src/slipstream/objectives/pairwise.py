"""Preference losses of two completions of the same prompt: Online DPO, Nash-MD and XPO.

Legend: (P,) a value per pair, (B,) per row of a micro-batch, (N,) per token of one; see `segments`. The functions of
pairs take sums over a row's completion tokens, as `segments.row_sum` makes them. Log-probabilities are those of the
logits as they are, not divided by the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from slipstream.objectives.segments import row_sum

LOSS_TYPES = ("sigmoid", "ipo")


def penalize_missing_eos(scores: Tensor, truncated: Tensor, penalty: float | None) -> Tensor:
    """Scores, of any shape, less `penalty` where a completion was cut off before its end; None: as they are."""
    return scores if penalty is None else scores - penalty * truncated


class Choice(NamedTuple):
    """Which of two completions is better.

    Attributes:
        first_P: True where the first one is chosen.
        judged_P: False where nothing is known; such a pair enters no loss and no normalizer.
    """

    first_P: Tensor
    judged_P: Tensor


def choose(first_scores_P: Tensor, second_scores_P: Tensor) -> Choice:
    """The completion with the higher score is chosen; of equal ones, the first. A pair with a NaN is not judged."""
    judged_P = ~(first_scores_P.isnan() | second_scores_P.isnan())
    return Choice(first_scores_P >= second_scores_P, judged_P)


def preference_probabilities(first_scores_P: Tensor, second_scores_P: Tensor) -> Tensor:
    """Bradley-Terry's probability that the first completion is preferred, sigma(s - s'), shape (P,); NaN stays NaN."""
    return torch.sigmoid(first_scores_P - second_scores_P)


def margins(
    chosen_logps_P: Tensor, rejected_logps_P: Tensor, chosen_ref_logps_P: Tensor, rejected_ref_logps_P: Tensor
) -> Tensor:
    """h, shape (P,): how much more the policy prefers the chosen completion than the reference does."""
    return (chosen_logps_P - rejected_logps_P) - (chosen_ref_logps_P - rejected_ref_logps_P)


def preference_loss(margins_P: Tensor, beta: float, loss_type: str) -> Tensor:
    """The loss of each pair, shape (P,).

    Args:
        margins_P: h, see `margins`.
        beta: How strongly the policy is held to the reference; above 0.
        loss_type: `sigmoid` is DPO's -log sigma(beta h) (https://arxiv.org/abs/2305.18290), `ipo` is
            (h - 1 / (2 beta))^2 (https://arxiv.org/abs/2310.12036).

    Raises:
        ValueError: another `loss_type`.
    """
    if loss_type == "sigmoid":
        return -logsigmoid(beta * margins_P)
    if loss_type == "ipo":
        return (margins_P - 1 / (2 * beta)).square()
    raise ValueError(f"loss_type={loss_type!r} is not one of {', '.join(map(repr, LOSS_TYPES))}.")


def exploration_bonus(reference_completion_logps_P: Tensor, alpha: float) -> Tensor:
    """XPO's bonus (https://arxiv.org/abs/2405.21046) as a loss, shape (P,): alpha * log policy(y'), with y' sampled
    from the reference. Minimized, it moves probability to completions that the reference would not have found."""
    return alpha * reference_completion_logps_P


def nash_md_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    probabilities_B: Tensor,
    mask_N: Tensor,
    rows_N: Tensor,
    beta: float,
) -> Tensor:
    """Nash-MD (https://arxiv.org/abs/2312.00886), on rows y that the policy sampled.

    Args:
        logps_N, ref_logps_N: Of y's tokens, under the policy (differentiable) and under the reference.
        probabilities_B: P(y beats y'), with y' sampled from the mixture of both; NaN: not judged.
        beta: Weight of the KL divergence from the reference.

    Returns:
        The loss of each row, of which only the gradient means something: beta * kl + score with
        kl = sum sg[log policy - log reference] * log policy, and score = -(P(y beats y') - 1/2) * sum log policy.
        It is 0, without a gradient, for a row that is not judged.
    """
    rows = len(probabilities_B)
    judged_B = ~probabilities_B.isnan()
    kept_N = (mask_N > 0) & judged_B[rows_N]
    logps_N = torch.where(kept_N, logps_N, 0.0)
    log_ratio_N = torch.where(kept_N, logps_N - ref_logps_N, 0.0).detach()
    kl_B = row_sum(log_ratio_N * logps_N, rows_N, rows)
    score_B = -(probabilities_B.nan_to_num(0.5) - 0.5) * row_sum(logps_N, rows_N, rows)
    return beta * kl_B + score_B


def step_mean(losses: Tensor, counts: Tensor, total: float, ranks: int) -> Tensor:
    """This micro-batch's part of the mean over its optimizer step; the parts of all micro-batches and ranks add up.

    Gradients are averaged over ranks afterwards, which the factor `ranks` makes up for.

    Args:
        losses: Of pairs or of rows.
        counts: Which of them count: those that were judged.
        total: How many count in the whole optimizer step, over all ranks; where it is 0, so is the mean.
    """
    return torch.where(counts > 0, losses, 0.0).sum() * ranks / max(total, 1.0)
