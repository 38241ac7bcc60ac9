"""Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.checks import number, one_of
from slipstream.config import OnlineConfig, not_yet, option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives.advantages import combine_rewards, group_advantages
from slipstream.objectives.correction import sampler_correction
from slipstream.objectives.policy import clipped_surrogate, kl_k3
from slipstream.objectives.segments import row_mean, row_sum
from slipstream.records import MicroBatch
from slipstream.trainers.base import OnlineTrainer
from slipstream.trainers.metrics import Tally

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
# Fields whose other values are planned, with the one that works now.
GRPO_NOT_YET = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "delta": None,
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "sync_ref_model": False,
    "router_aux_loss_coef": None,
    "cast_lm_head_to_fp32": False,
    "max_tool_calling_iterations": None,
}


@dataclass
class GRPOConfig(OnlineConfig):
    """Configuration of `GRPOTrainer`; what all trainers share is in `OnlineConfig`."""

    beta: float = option(0.0, "Weight of the KL penalty; 0.0 loads no reference model.")
    num_iterations: int = option(1, "Optimizer steps made of each generation batch (mu).")
    epsilon: float = option(0.2, "Clip range of the ratio, below 1.")
    epsilon_high: float | None = option(None, "Clip range above 1; None: epsilon.")
    delta: float | None = option(None, "Upper bound of the ratio, against large steps when A < 0.")
    importance_sampling_level: str = option("token", "`token`, or `sequence` (GSPO).")
    multi_objective_aggregation: str = option("sum_then_normalize", "Or `normalize_then_sum` (GDPO).")
    scale_rewards: str | bool = option("group", "Divide advantages by the std of the `group`, the `batch`, or `none`.")
    loss_type: str = option("dapo", f"One of {', '.join(LOSS_TYPES)}.")
    mask_truncated_completions: bool = option(False, "Leave truncated completions out of the loss.")
    sync_ref_model: bool = option(False, "Move the reference towards the policy now and then.")
    ref_model_mixup_alpha: float = option(0.6, "How far, at each of these.")
    ref_model_sync_steps: int = option(512, "Optimizer steps between them.")
    top_entropy_quantile: float = option(1.0, "Train on this share of tokens, those of highest entropy.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    use_adaptive_entropy: bool = option(False, "Adapt that weight towards entropy_target.")
    entropy_coef_min: float = option(0.0, "Its lower bound.")
    entropy_coef_max: float = option(1.0, "Its upper bound.")
    entropy_coef_delta: float = option(0.005, "Its change in each optimizer step.")
    entropy_target: float = option(0.2, "The entropy aimed at.")
    sapo_temperature_neg: float = option(1.05, "Temperature of `sapo` where A <= 0.")
    sapo_temperature_pos: float = option(1.0, "Temperature of `sapo` where A > 0.")
    vespo_k_pos: float = option(2.0, "Shape of `vespo` where A >= 0.")
    vespo_lambda_pos: float = option(3.0, "Rate of `vespo` where A >= 0.")
    vespo_k_neg: float = option(3.0, "Shape of `vespo` where A < 0.")
    vespo_lambda_neg: float = option(2.0, "Rate of `vespo` where A < 0.")
    off_policy_mask_threshold: float | None = option(None, "Drop rows with A < 0 that drifted further than this.")
    use_bias_correction_kl: bool = option(True, "Weight the KL estimate by the ratio, which makes it unbiased.")
    max_tool_calling_iterations: int | None = option(None, "Turns of tool calls in a completion, at most.")
    router_aux_loss_coef: float | None = option(None, "Weight of a mixture of experts' load balancing loss.")
    cast_lm_head_to_fp32: bool = option(False, "Compute logits in float32.")

    def _check_values(self) -> None:
        super()._check_values()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} is not allowed: GRPO compares completions of the same prompt, "
                "so it must be >= 2."
            )
        number("beta", self.beta, least=0)
        number("num_iterations", self.num_iterations, least=1, integer=True)
        number("epsilon", self.epsilon, least=0)
        if self.epsilon_high is not None:
            number("epsilon_high", self.epsilon_high, least=0)
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        one_of(
            "multi_objective_aggregation",
            self.multi_objective_aggregation,
            ("sum_then_normalize", "normalize_then_sum"),
        )
        not_yet(self, GRPO_NOT_YET)


class GRPOTrainer(OnlineTrainer):
    """Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300), by default with DAPO's normalization
    (https://arxiv.org/abs/2503.14476): the loss is a mean over all completion tokens of the optimizer step.

    Arguments are those of `OnlineTrainer`, and:

    Args:
        tools, environment_factory, rollout_func: Accepted for compatibility; not there yet.

    Example:
        ```python
        trainer = GRPOTrainer("Qwen/Qwen3-0.6B", accuracy_reward, GRPOConfig("out", use_vllm=True), dataset)
        trainer.train()
        ```
    """

    config_class = GRPOConfig
    args: GRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        for name, value in (
            ("tools", tools),
            ("rollout_func", rollout_func),
            ("environment_factory", environment_factory),
        ):
            if value is not None:
                raise NotImplementedError(f"{name} is not there yet: leave it None.")
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
            callbacks, optimizers, quantization_config, peft_config,
        )  # fmt: skip

    def advantages(self, rewards_RF: Tensor, group_size: int) -> Tensor:
        """Rewards summed over functions, normalized within each group."""
        return group_advantages(combine_rewards(rewards_RF, self.reward_weights_F), group_size)

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The clipped surrogate of every completion token, averaged over the tokens of the optimizer step."""
        args, logps, mask = self.args, output.logps_N, batch.mask_N
        # On-policy, the old policy is this one: the ratio is 1, and its gradient that of the log-probability.
        old_logps = batch.per_token.get("old_logps", logps.detach())
        advantages = batch.advantages_B[batch.rows_N]
        ratio = (logps - old_logps).exp()
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        loss, clipped_low, clipped_high = clipped_surrogate(ratio, advantages, args.epsilon, high)
        if "sampler_logps" in batch.per_token:
            loss = loss * self._correct_sampler(old_logps, batch, tally)
        if args.beta:
            kl = kl_k3(logps, batch.per_token["ref_logps"])
            if args.use_bias_correction_kl:
                kl = kl * ratio
            loss = loss + args.beta * kl
            tally.mean("kl", kl, mask)
        if output.entropies_N is not None:
            tally.mean("entropy", output.entropies_N, mask)
        self._tally_clipping(clipped_low, clipped_high, batch, tally)
        return (loss * mask).sum() / (batch.totals.tokens / batch.totals.ranks)

    def _correct_sampler(self, old_logps: Tensor, batch: MicroBatch, tally: Tally) -> Tensor | float:
        """Weights that make up for the engine's probabilities differing from the trainer's."""
        args, rows, sampler_logps = self.args, len(batch.rollouts), batch.per_token["sampler_logps"]
        # vLLM reports NaN where it could not tell: such a token is not corrected.
        mask = batch.mask_N * sampler_logps.isfinite()
        difference = torch.where(mask > 0, old_logps - sampler_logps, 0.0).abs()
        tally.mean("sampling/sampling_logp_difference/mean", difference, mask)
        tally.max("sampling/sampling_logp_difference/max", difference, mask)
        correction = sampler_correction(
            old_logps, sampler_logps, mask, batch.rows_N, rows, args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max,
        )  # fmt: skip
        tally.mean("sampling/importance_sampling_ratio/mean", correction.ratios, correction.counts)
        tally.min("sampling/importance_sampling_ratio/min", correction.ratios, correction.counts)
        tally.max("sampling/importance_sampling_ratio/max", correction.ratios, correction.counts)
        tally.mean("sampling/masked_fraction", correction.changed, correction.counts)
        return correction.weights_N if args.vllm_importance_sampling_correction else 1.0

    def _tally_clipping(self, low: Tensor, high: Tensor, batch: MicroBatch, tally: Tally) -> None:
        mask, rows = batch.mask_N, len(batch.rollouts)
        lengths = row_sum(mask, batch.rows_N, rows)
        tally.mean("clip_ratio/low_mean", low, mask)
        tally.mean("clip_ratio/high_mean", high, mask)
        tally.mean("clip_ratio/region_mean", low + high, mask)
        tally.min("clip_ratio/low_min", row_mean(low, mask, batch.rows_N, rows), lengths)
        tally.max("clip_ratio/high_max", row_mean(high, mask, batch.rows_N, rows), lengths)
