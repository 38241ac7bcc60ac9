"""Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.checks import number, one_of
from slipstream.config import OnlineConfig, option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.modeling.packing import loss_mask
from slipstream.objectives import grpo as losses
from slipstream.objectives.advantages import combine_rewards, decoupled_advantages, group_advantages
from slipstream.objectives.correction import sampler_correction
from slipstream.objectives.policy import clipped_surrogate, kl_k3
from slipstream.objectives.segments import row_mean, row_sum
from slipstream.records import MicroBatch, Rollout
from slipstream.trainers.base import OnlineTrainer
from slipstream.trainers.metrics import Tally
from slipstream.trainers.reference import ReferenceSync


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
    loss_type: str = option("dapo", f"One of {', '.join(losses.LOSS_TYPES)}.")
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
    max_tool_calling_iterations: int | None = option(
        None, "Turns of tool calls, at most; for tools, which are not there yet."
    )
    router_aux_loss_coef: float | None = option(None, "Weight of a mixture of experts' load balancing loss.")
    cast_lm_head_to_fp32: bool = option(False, "Compute logits in float32.")

    def _check_values(self) -> None:
        super()._check_values()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        one_of("loss_type", self.loss_type, losses.LOSS_TYPES)
        one_of("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        aggregations = ("sum_then_normalize", "normalize_then_sum")
        one_of("multi_objective_aggregation", self.multi_objective_aggregation, aggregations)
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} is not allowed: GRPO compares completions of the same prompt, "
                "so it must be >= 2."
            )
        number("num_iterations", self.num_iterations, least=1, integer=True)
        number("ref_model_sync_steps", self.ref_model_sync_steps, least=1, integer=True)
        number("ref_model_mixup_alpha", self.ref_model_mixup_alpha, least=0, most=1)
        number("top_entropy_quantile", self.top_entropy_quantile, above=0, most=1)
        for name in ("beta", "epsilon", "entropy_coef", "entropy_coef_min", "entropy_coef_delta", "entropy_target"):
            number(name, getattr(self, name), least=0)
        number("entropy_coef_max", self.entropy_coef_max, least=self.entropy_coef_min)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos",
                     "vespo_lambda_neg"):  # fmt: skip
            number(name, getattr(self, name), above=0)
        for name in ("epsilon_high", "delta", "off_policy_mask_threshold", "router_aux_loss_coef"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), least=0)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high <= 1):
            raise ValueError(
                f"epsilon_high={self.epsilon_high} does not go with loss_type='cispo', where it is the largest "
                "weight of a token: set it above 1, for example 5.0."
            )
        if self.loss_type == "vespo" and self.importance_sampling_level != "token":
            raise ValueError("loss_type='vespo' weights whole rows itself: set importance_sampling_level='token'.")
        mode, corrects = self.vllm_importance_sampling_mode, self.vllm_importance_sampling_correction
        if self.loss_type == "vespo" and self.use_vllm and corrects and not mode.startswith("token_"):
            raise ValueError(
                f"loss_type='vespo' multiplies the ratios of a row's tokens, so vllm_importance_sampling_mode={mode!r} "
                "would count them twice: set it to 'token_truncate' or 'token_mask'."
            )
        if self.sync_ref_model and not self.beta:
            raise ValueError("sync_ref_model=True needs a reference model, and beta=0.0 loads none: set beta above 0.")
        if self.max_tool_calling_iterations is not None:
            number("max_tool_calling_iterations", self.max_tool_calling_iterations, least=1, integer=True)


class GRPOTrainer(OnlineTrainer):
    """Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300), by default with DAPO's normalization
    (https://arxiv.org/abs/2503.14476): the loss is a mean over all completion tokens of the optimizer step.

    Arguments are those of `OnlineTrainer`, and:

    Args:
        rollout_func: Samples in the place of the engine: `f(prompts, trainer) -> {"prompt_ids", "completion_ids",
            "logprobs"}`, a list with one entry a prompt each (logprobs may be None). Prompts come as they are in the
            dataset, once for each of their completions. `env_mask` marks the policy's own tokens with 1 and leaves
            others (0) out of the loss; other keys become columns for the reward functions. `trainer.engine` holds the
            present weights and can be asked: `generate([Request(ids, n, seed)], trainer.args.sampling())`.
        tools, environment_factory: Accepted for compatibility; not there yet.

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
        for name, value in (("tools", tools), ("environment_factory", environment_factory)):
            if value is not None:
                raise NotImplementedError(f"{name} is not there yet: leave it None.")
        if rollout_func is not None and not callable(rollout_func):
            raise TypeError(f"rollout_func={rollout_func!r} is not a function.")
        self.rollout_func = rollout_func
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
            callbacks, optimizers, quantization_config, peft_config,
        )  # fmt: skip
        self.entropy_coef = self.args.entropy_coef
        # Above any target, so that an adaptive bonus waits for the first measurement.
        self.last_entropy = math.inf
        self.router_coef = _router_coefficient(self.model, self.args.router_aux_loss_coef)
        if self.args.sync_ref_model:
            self.add_callback(ReferenceSync(self))

    def advantages(self, rewards_RF: Tensor, group_size: int) -> Tensor:
        """Rewards summed over functions and normalized, in this order or the other."""
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            return decoupled_advantages(rewards_RF, self.reward_weights_F, group_size)
        total_R = combine_rewards(rewards_RF, self.reward_weights_F)
        return group_advantages(total_R, group_size, str(self.args.scale_rewards))

    def prepare(self, model: nn.Module, rollouts: Sequence[Rollout]) -> None:
        """Choose the rows and tokens that enter the loss."""
        if self.args.mask_truncated_completions:
            for rollout in rollouts:
                rollout.in_loss = rollout.in_loss and not rollout.truncated
        if self.args.top_entropy_quantile < 1:
            self._annotate(model, rollouts, "entropies", entropies=True)
            masks = [loss_mask(r).to(self.accelerator.device) > 0 for r in rollouts]
            threshold = self._entropy_threshold(
                [r.extra["entropies"][kept] for r, kept in zip(rollouts, masks, strict=True)]
            )
            for rollout in rollouts:
                rollout.extra["entropy_mask"] = (rollout.extra.pop("entropies") >= threshold).float()

    def _entropy_threshold(self, entropies: Sequence[Tensor]) -> Tensor:
        """The entropy that a share of `top_entropy_quantile` of all ranks' tokens reach."""
        device = self.accelerator.device
        own = torch.cat([*entropies, torch.empty(0, device=device)]).unsqueeze(0)
        every = self.accelerator.gather(self.accelerator.pad_across_processes(own, dim=1, pad_index=-1)).flatten()
        return torch.quantile(every[every >= 0], 1 - self.args.top_entropy_quantile)

    def scoring_options(self) -> dict[str, Any]:
        """What the loss needs of a forward pass."""
        return {
            "entropy_gradient": self._has_bonus,
            "router_loss": bool(self.router_coef),
            "float32_head": self.args.cast_lm_head_to_fp32,
        }

    @property
    def _has_bonus(self) -> bool:
        return bool(self.args.entropy_coef) or self.args.use_adaptive_entropy

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The loss of `loss_type`, with KL penalty, entropy bonus and the experts' balance where they are asked for."""
        args, logps, mask, rows = self.args, output.logps_N, batch.mask_N, len(batch.rollouts)
        # On-policy, the old policy is this one: the ratio is 1, and its gradient that of the log-probability.
        old_logps = batch.per_token.get("old_logps", logps.detach())
        log_ratio = logps - old_logps
        ratio = losses.log_weights(log_ratio, mask, batch.rows_N, rows, args.importance_sampling_level).exp()
        correction = self._correct_sampler(old_logps, batch, tally)
        loss = self._token_loss(ratio, log_ratio, logps, correction, batch, tally)
        if args.off_policy_mask_threshold is not None:
            sampled = batch.per_token.get("sampler_logps", old_logps)
            keep_B = losses.off_policy_mask(
                logps, sampled, batch.advantages_B, mask, batch.rows_N, args.off_policy_mask_threshold
            )
            loss = loss * keep_B[batch.rows_N]
        chosen = batch.per_token.get("entropy_mask", torch.ones_like(mask))
        loss = loss * chosen
        if correction is not None and args.loss_type != "vespo":
            loss = loss * correction
        if args.beta:
            kl = kl_k3(logps, batch.per_token["ref_logps"])
            if args.use_bias_correction_kl:
                kl = kl * ratio
            loss = loss + args.beta * kl
            tally.mean("kl", kl, mask)
        longest = args.max_completion_length
        total = losses.aggregate(args.loss_type, loss, mask, batch.rows_N, batch.totals, rows, longest)
        if output.entropies_N is not None:
            tally.mean("entropy", output.entropies_N, mask)
        if self._has_bonus:
            assert output.entropies_N is not None  # scoring_options asks for them
            coefficient = self.entropy_coef
            if args.use_adaptive_entropy and self.last_entropy > args.entropy_target:
                coefficient = 0.0
            bonus = (output.entropies_N * mask * chosen).sum() * batch.totals.ranks / batch.totals.chosen_tokens
            total = total - coefficient * bonus
            tally.mean("entropy/chosen", output.entropies_N, mask * chosen)
        if output.router_loss is not None:
            share = rows * batch.totals.ranks / batch.totals.rows
            total = total + self.router_coef * output.router_loss * share
            tally.mean("aux_loss", output.router_loss)
        return total

    def _token_loss(
        self,
        ratio: Tensor,
        log_ratio: Tensor,
        logps: Tensor,
        correction: Tensor | None,
        batch: MicroBatch,
        tally: Tally,
    ) -> Tensor:
        args, mask, advantages = self.args, batch.mask_N, batch.advantages_B[batch.rows_N]
        if args.loss_type == "cispo":
            assert args.epsilon_high is not None  # checked by the config
            loss, capped = losses.cispo(ratio, advantages, logps, args.epsilon_high)
            tally.mean("cispo_clip_ratio", capped, mask)
            return loss
        if args.loss_type == "sapo":
            return losses.sapo(ratio, advantages, args.sapo_temperature_pos, args.sapo_temperature_neg)
        if args.loss_type == "vespo":
            phi_B = losses.vespo_weights(
                log_ratio, correction, batch.advantages_B, mask, batch.rows_N,
                positive=(args.vespo_k_pos, args.vespo_lambda_pos), negative=(args.vespo_k_neg, args.vespo_lambda_neg),
            )  # fmt: skip
            tally.mean("vespo/phi_seq_mean", phi_B)
            return -phi_B[batch.rows_N] * advantages * logps
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        loss, clipped_low, clipped_high = clipped_surrogate(ratio, advantages, args.epsilon, high, args.delta)
        self._tally_clipping(clipped_low, clipped_high, batch, tally)
        return loss

    def _correct_sampler(self, old_logps: Tensor, batch: MicroBatch, tally: Tally) -> Tensor | None:
        """Weights that make up for the engine's probabilities differing from the trainer's."""
        if "sampler_logps" not in batch.per_token:
            return None
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
        return correction.weights_N if args.vllm_importance_sampling_correction else None

    def _tally_clipping(self, low: Tensor, high: Tensor, batch: MicroBatch, tally: Tally) -> None:
        mask, rows = batch.mask_N, len(batch.rollouts)
        lengths = row_sum(mask, batch.rows_N, rows)
        tally.mean("clip_ratio/low_mean", low, mask)
        tally.mean("clip_ratio/high_mean", high, mask)
        tally.mean("clip_ratio/region_mean", low + high, mask)
        tally.min("clip_ratio/low_min", row_mean(low, mask, batch.rows_N, rows), lengths)
        tally.max("clip_ratio/high_max", row_mean(high, mask, batch.rows_N, rows), lengths)

    def learned(self, metrics: dict[str, float]) -> None:
        """Move an adaptive entropy coefficient towards the target, once an optimizer step."""
        if not self._has_bonus:
            return
        args = self.args
        if args.use_adaptive_entropy and "entropy/chosen" in metrics:
            self.last_entropy = metrics["entropy/chosen"]
            if self.last_entropy <= args.entropy_target:
                self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
            else:
                self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        metrics["entropy_coef"] = self.entropy_coef

    def _extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"entropy_coef": self.entropy_coef, "last_entropy": self.last_entropy}
        if self.args.sync_ref_model:
            state["reference"] = self.accelerator.unwrap_model(self.reference).state_dict()
        return state

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self.entropy_coef, self.last_entropy = state["entropy_coef"], state["last_entropy"]
        if self.args.sync_ref_model:
            self.accelerator.unwrap_model(self.reference).load_state_dict(state["reference"])


def _router_coefficient(model: Any, wanted: float | None) -> float:
    """Weight of the load balancing loss: the one wanted, or else the model's own; 0.0 for a model without experts."""
    config = model.config.get_text_config()
    has_experts = hasattr(config, "output_router_logits")
    if wanted and not has_experts:
        raise ValueError(
            f"router_aux_loss_coef={wanted}, but {type(model).__name__} has no experts whose load could be balanced: "
            "leave it None."
        )
    own = getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted
    return float(own or 0.0) if has_experts else 0.0
