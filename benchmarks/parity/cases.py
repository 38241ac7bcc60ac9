"""What is compared: every loss type under every option that it has, and every way to make advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PLAIN = "off-policy"
CLIPPED = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
NOT_VESPO = LOSS_TYPES[:-1]
# The cap has to be met by some ratios to show anything; cispo's default is far above them.
REQUIRED: dict[str, dict[str, Any]] = {"cispo": {"epsilon_high": 1.1}}


@dataclass(frozen=True)
class Option:
    """A row of the table.

    Attributes:
        settings: Fields of both configurations.
        loss_types: Those that have this option.
        on_policy: The weights that sampled are those that learn; otherwise they have moved on since.
        sampled: The engine reports log-probabilities of its own, which differ from the trainer's.
        unknown: Some of them are NaN.
        moe: The model is a mixture of experts.
        ragged: Prompts have different lengths.
        base: The row that this one adds something to; the gradient must not be the same as there.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    loss_types: tuple[str, ...] = LOSS_TYPES
    on_policy: bool = False
    sampled: bool = False
    unknown: bool = False
    moe: bool = False
    ragged: bool = False
    base: str | None = PLAIN


def _corrected(mode: str, low: float | None, high: float, loss_types: tuple[str, ...] = LOSS_TYPES) -> Option:
    settings = {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }
    return Option(settings, loss_types, sampled=True)


_TOKEN_MASK = _corrected("token_mask", 0.75, 1.3).settings
_SEQUENCE = {"importance_sampling_level": "sequence"}

OPTIONS: dict[str, Option] = {
    PLAIN: Option(base=None),
    "prompts of different lengths": Option(ragged=True),
    "on-policy": Option(on_policy=True),
    "sequence level": Option(_SEQUENCE, NOT_VESPO),
    "temperature 0.7": Option({"temperature": 0.7}),
    "epsilon_high 0.4": Option({"epsilon_high": 0.4}, CLIPPED),
    "delta 1.4": Option({"delta": 1.4}, CLIPPED),
    "delta 1.02, sequence level": Option({"delta": 1.02, **_SEQUENCE}, CLIPPED, base="sequence level"),
    "beta": Option({"beta": 0.5, "use_bias_correction_kl": False}),
    "beta, use_bias_correction_kl": Option({"beta": 0.5, "use_bias_correction_kl": True}, base="beta"),
    "beta, on-policy": Option({"beta": 0.5, "use_bias_correction_kl": True}, on_policy=True, base="on-policy"),
    "beta, sequence level": Option(
        {"beta": 0.5, "use_bias_correction_kl": True, **_SEQUENCE}, NOT_VESPO, base="sequence level"
    ),
    "top_entropy_quantile 0.4": Option({"top_entropy_quantile": 0.4}),
    "entropy_coef": Option({"entropy_coef": 0.1}),
    "entropy_coef, top_entropy_quantile 0.4": Option(
        {"entropy_coef": 0.1, "top_entropy_quantile": 0.4}, base="entropy_coef"
    ),
    "off_policy_mask_threshold": Option({"off_policy_mask_threshold": 0.0}),
    "off_policy_mask_threshold, sampler": Option(
        {"off_policy_mask_threshold": 0.1, "vllm_importance_sampling_correction": False},
        sampled=True,
        base="off_policy_mask_threshold",
    ),
    "mask_truncated_completions": Option({"mask_truncated_completions": True}),
    "mask_truncated_completions, entropy_coef, top_entropy_quantile 0.4": Option(
        {"mask_truncated_completions": True, "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
        base="entropy_coef, top_entropy_quantile 0.4",
    ),
    "sampler token_truncate": _corrected("token_truncate", 0.75, 1.3),
    "sampler token_mask": _corrected("token_mask", 0.75, 1.3),
    "sampler sequence_truncate": _corrected("sequence_truncate", 0.5, 3.0, NOT_VESPO),
    "sampler sequence_mask": _corrected("sequence_mask", None, 3.0, NOT_VESPO),
    "sampler token_mask, on-policy": Option(_TOKEN_MASK, sampled=True, on_policy=True, base="on-policy"),
    "sampler token_mask, some tokens unknown": Option(
        _TOKEN_MASK, sampled=True, unknown=True, base="sampler token_mask"
    ),
    "GDPO advantages": Option({"multi_objective_aggregation": "normalize_then_sum"}),
    "no scaling of rewards": Option({"scale_rewards": "none"}),
    "router_aux_loss_coef": Option({"router_aux_loss_coef": 0.1}, moe=True, base=None),
    "everything": Option(
        {"beta": 0.5, "use_bias_correction_kl": True, "entropy_coef": 0.1, "top_entropy_quantile": 0.6,
         "off_policy_mask_threshold": 0.3, "mask_truncated_completions": True, **_TOKEN_MASK},
        sampled=True,
    ),
}  # fmt: skip

NONE = None
# Rewards of three groups of four by two functions; None: not scorable.
REWARDS: dict[str, list[list[float | None]]] = {
    "all scored": [[0.1, 0.9, 0.4, 0.3, 1.0, 0.0, 0.5, 0.25, 0.7, 0.2, 0.6, 0.8],
                   [-3.0, 1.0, 0.5, 2.0, 0.0, 0.0, -1.0, 4.0, 2.5, -0.5, 1.5, 0.5]],
    "some not scored": [[0.1, NONE, 0.4, 0.3, 1.0, 0.0, NONE, 0.25, 0.7, 0.2, 0.6, 0.8],
                        [-3.0, NONE, 0.5, NONE, 0.0, 0.0, -1.0, 4.0, 2.5, -0.5, NONE, 0.5]],
    "a group all alike": [[0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.5, 0.25, 0.7, 0.2, 0.6, 0.8],
                          [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, 4.0, 2.5, -0.5, 1.5, 0.5]],
    "a group with one scored": [[0.1, 0.9, 0.4, 0.3, NONE, NONE, 0.5, NONE, 0.7, 0.2, 0.6, 0.8],
                                [-3.0, 1.0, 0.5, 2.0, NONE, NONE, NONE, NONE, 2.5, -0.5, 1.5, 0.5]],
    "a group not scored": [[NONE, NONE, NONE, NONE, 1.0, 0.0, 0.5, 0.25, 0.7, 0.2, 0.6, 0.8],
                           [NONE, NONE, NONE, NONE, 0.0, 0.0, -1.0, 4.0, 2.5, -0.5, 1.5, 0.5]],
}  # fmt: skip
SCALINGS: dict[str, dict[str, Any]] = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "GDPO": {"multi_objective_aggregation": "normalize_then_sum"},
}
