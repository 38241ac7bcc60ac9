"""Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.checks import number, one_of
from slipstream.config import option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives import grpo as losses
from slipstream.objectives.advantages import combine_rewards, decoupled_advantages, group_advantages
from slipstream.objectives.policy import clipped_surrogate, kl_k3
from slipstream.objectives.segments import row_mean, row_sum
from slipstream.records import MicroBatch, Rollout
from slipstream.rollouts.tools import Toolbox
from slipstream.trainers.entropy import EntropyConfig, EntropyTrainer
from slipstream.trainers.inputs import rows_of_environments, with_rewards
from slipstream.trainers.metrics import Tally
from slipstream.trainers.policy_gradient import tally_clipping, tally_clipping_extrema


@dataclass
class GRPOConfig(EntropyConfig):
    """Configuration of `GRPOTrainer`; what it shares with RLOO is in `PolicyGradientConfig`, with all in
    `OnlineConfig`."""

    delta: float | None = option(None, "Upper bound of the ratio, against large steps when A < 0.")
    importance_sampling_level: str = option("token", "`token`, or `sequence` (GSPO).")
    multi_objective_aggregation: str = option("sum_then_normalize", "Or `normalize_then_sum` (GDPO).")
    scale_rewards: str | bool = option("group", "Divide advantages by the std of the `group`, the `batch`, or `none`.")
    loss_type: str = option("dapo", f"One of {', '.join(losses.LOSS_TYPES)}.")
    sapo_temperature_neg: float = option(1.05, "Temperature of `sapo` where A <= 0.")
    sapo_temperature_pos: float = option(1.0, "Temperature of `sapo` where A > 0.")
    vespo_k_pos: float = option(2.0, "Shape of `vespo` where A >= 0.")
    vespo_lambda_pos: float = option(3.0, "Rate of `vespo` where A >= 0.")
    vespo_k_neg: float = option(3.0, "Shape of `vespo` where A < 0.")
    vespo_lambda_neg: float = option(2.0, "Rate of `vespo` where A < 0.")
    off_policy_mask_threshold: float | None = option(None, "Drop rows with A < 0 that drifted further than this.")
    use_bias_correction_kl: bool = option(True, "Weight the KL estimate by the ratio, which makes it unbiased.")
    max_tool_calling_iterations: int | None = option(
        None, "How often the tool calls of a completion are answered, at most; None: as often as there is room."
    )
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
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos",
                     "vespo_lambda_neg"):  # fmt: skip
            number(name, getattr(self, name), above=0)
        for name in ("delta", "off_policy_mask_threshold"):
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
        if self.use_vllm and self.vllm_importance_sampling_correction:
            self.check_correction_of_vespo()
        if self.max_tool_calling_iterations is not None:
            number("max_tool_calling_iterations", self.max_tool_calling_iterations, least=1, integer=True)

    def check_correction_of_vespo(self) -> None:
        """Raise ValueError if `vespo` would be given the sampler correction of whole rows."""
        mode = self.vllm_importance_sampling_mode
        if self.loss_type == "vespo" and not mode.startswith("token_"):
            raise ValueError(
                f"loss_type='vespo' multiplies the ratios of a row's tokens, so vllm_importance_sampling_mode={mode!r} "
                "would count them twice: set it to 'token_truncate' or 'token_mask'."
            )


class GRPOTrainer(EntropyTrainer):
    """Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300), by default with DAPO's normalization
    (https://arxiv.org/abs/2503.14476): the loss is a mean over all completion tokens of the optimizer step.

    Arguments are those of `OnlineTrainer`, and:

    Args:
        rollout_func: Samples in the place of the engine: `f(prompts, trainer) -> {"prompt_ids", "completion_ids",
            "logprobs"}`, a list with one entry a prompt each (logprobs may be None). Prompts come as they are in the
            dataset, once for each of their completions. `env_mask` marks the policy's own tokens with 1 and leaves
            others (0) out of the loss; other keys become columns for the reward functions. `trainer.engine` holds the
            present weights and can be asked: `generate([Request(ids, n, seed)], trainer.args.sampling())`. If a server
            is lost meanwhile (`EngineLostError`), the function is called again with the same prompts once it is back.
        tools: Functions that the model may call, plain or async, with type hints and docstrings in Google's style.
            It is told what they return and goes on; it is trained on its own tokens alone.
        environment_factory: Makes an object for each rollout, whose `reset(**row)` may return a string that is added to
            the prompt's last message, and whose other public methods are tools. Reward functions get the objects as
            `environments`; with a method `get_reward`, they are a reward function themselves. A dict has several kinds,
            of which a row's column `environment` names one. With one kind and `max_steps`, `train_dataset` may be left
            out: `reset` gives the prompts.

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
        if tools or environment_factory is not None:
            if rollout_func is not None:
                raise ValueError(
                    "rollout_func samples in the place of the engine, so nothing would call tools or make "
                    "environments: leave out either rollout_func, or tools and environment_factory."
                )
            self.toolbox = Toolbox(tools, environment_factory)
            if self.toolbox.rewards:
                reward_funcs, reward_processing_classes, args = with_rewards(
                    self.toolbox.rewards, reward_funcs, reward_processing_classes, args
                )
            if train_dataset is None and self.toolbox.has_environments and not self.toolbox.several:
                train_dataset = rows_of_environments(args)
        if rollout_func is not None and not callable(rollout_func):
            raise TypeError(f"rollout_func={rollout_func!r} is not a function.")
        self.rollout_func = rollout_func
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
            callbacks, optimizers, quantization_config, peft_config,
        )  # fmt: skip

    def advantages(self, rewards_RF: Tensor, rollouts: Sequence[Rollout], group_size: int) -> Tensor:
        """Rewards summed over functions and normalized, in this order or the other."""
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            return decoupled_advantages(rewards_RF, self.reward_weights_F, group_size)
        total_R = combine_rewards(rewards_RF, self.reward_weights_F)
        return group_advantages(total_R, group_size, str(self.args.scale_rewards))

    def scoring_options(self) -> dict[str, Any]:
        """What the loss needs of a forward pass."""
        return super().scoring_options() | {"float32_head": self.args.cast_lm_head_to_fp32}

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The loss of `loss_type`, with KL penalty, entropy bonus and the experts' balance where they are asked for."""
        args, logps, mask, rows = self.args, output.logps_N, batch.mask_N, len(batch.rollouts)
        # On-policy, the old policy is this one: the ratio is 1, and its gradient that of the log-probability.
        old_logps = batch.per_token.get("old_logps", logps.detach())
        log_ratio = logps - old_logps
        ratio = losses.log_weights(log_ratio, mask, batch.rows_N, rows, args.importance_sampling_level).exp()
        correction = self.correct_sampler(old_logps, batch, tally)
        loss = self._token_loss(ratio, log_ratio, logps, correction, batch, tally)
        if args.off_policy_mask_threshold is not None:
            sampled = batch.per_token.get("sampler_logps", old_logps)
            keep_B = losses.off_policy_mask(
                logps, sampled, batch.advantages_B, mask, batch.rows_N, args.off_policy_mask_threshold
            )
            loss = loss * keep_B[batch.rows_N]
        loss = loss * batch.per_token.get("entropy_mask", torch.ones_like(mask))
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
        return self.add_router_loss(self.add_bonus(total, output, batch, tally), output, batch, tally)

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
            if correction is not None:
                args.check_correction_of_vespo()  # again: a rollout_func may know log-probabilities without vLLM
            phi_B = losses.vespo_weights(
                log_ratio, correction, batch.advantages_B, mask, batch.rows_N,
                positive=(args.vespo_k_pos, args.vespo_lambda_pos), negative=(args.vespo_k_neg, args.vespo_lambda_neg),
            )  # fmt: skip
            tally.mean("vespo/phi_seq_mean", phi_B)
            return -phi_B[batch.rows_N] * advantages * logps
        loss, low, high = clipped_surrogate(ratio, advantages, *args.clip_range, args.delta)
        tally_clipping(tally, low, high, mask)
        owner, rows = batch.rows_N, len(batch.rollouts)
        lengths = row_sum(mask, owner, rows)
        tally_clipping_extrema(tally, row_mean(low, mask, owner, rows), row_mean(high, mask, owner, rows), lengths)
        return loss
