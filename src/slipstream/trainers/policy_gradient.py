"""What GRPO and RLOO share: rewards become advantages, and a clipped ratio of probabilities is weighted by them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.checks import number, one_of
from slipstream.config import OnlineConfig, option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives.correction import sampler_correction
from slipstream.records import MicroBatch, Rollout
from slipstream.trainers.base import OnlineTrainer
from slipstream.trainers.metrics import Tally, reward_metrics
from slipstream.trainers.reference import ReferenceSync

SAMPLER_CORRECTIONS = (
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "sequence_geometric_truncate",
    "sequence_geometric_mask",
)


@dataclass
class PolicyGradientConfig(OnlineConfig):
    """What GRPO and RLOO share; the rest is in `OnlineConfig`."""

    beta: float = option(0.0, "Weight of the KL penalty; 0.0 loads no reference model.")
    num_iterations: int = option(1, "Optimizer steps made of each generation batch (mu).")
    epsilon: float = option(0.2, "Clip range of the ratio, below 1.")
    epsilon_high: float | None = option(None, "Clip range above 1; None: epsilon.")
    mask_truncated_completions: bool = option(False, "Leave truncated completions out of the loss.")
    sync_ref_model: bool = option(False, "Move the reference towards the policy now and then.")
    ref_model_mixup_alpha: float = option(0.6, "How far, at each of these.")
    ref_model_sync_steps: int = option(512, "Optimizer steps between them.")
    router_aux_loss_coef: float | None = option(None, "Weight of a mixture of experts' load balancing loss.")
    vllm_importance_sampling_correction: bool = option(
        True, "Correct for the difference between the sampler's and the trainer's log-probabilities."
    )
    vllm_importance_sampling_mode: str = option("sequence_mask", f"How: one of {', '.join(SAMPLER_CORRECTIONS)}.")
    vllm_importance_sampling_clip_max: float | None = option(3.0, "Upper bound of the correction ratio.")
    vllm_importance_sampling_cap: float | None = option(None, "The older name of that upper bound.")
    vllm_importance_sampling_clip_min: float | None = option(None, "Lower bound of the correction ratio.")

    def _check_values(self) -> None:
        super()._check_values()
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} is not allowed: completions of the same prompt are compared "
                "with each other, so it must be >= 2."
            )
        number("num_iterations", self.num_iterations, least=1, integer=True)
        number("ref_model_sync_steps", self.ref_model_sync_steps, least=1, integer=True)
        number("ref_model_mixup_alpha", self.ref_model_mixup_alpha, least=0, most=1)
        for name in ("beta", "epsilon"):
            number(name, getattr(self, name), least=0)
        for name in ("epsilon_high", "router_aux_loss_coef"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), least=0)
        if self.sync_ref_model and not self.beta:
            raise ValueError("sync_ref_model=True needs a reference model, and beta=0.0 loads none: set beta above 0.")
        self._check_correction()

    def _check_correction(self) -> None:
        if self.vllm_importance_sampling_cap is not None:
            warnings.warn(
                "vllm_importance_sampling_cap is the older name of vllm_importance_sampling_clip_max: use that one.",
                FutureWarning,
                stacklevel=4,
            )
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        one_of("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, SAMPLER_CORRECTIONS)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if high is not None:
            number("vllm_importance_sampling_clip_max", high, above=0)
        if low is not None:
            number("vllm_importance_sampling_clip_min", low, least=0)
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} must be below vllm_importance_sampling_clip_max={high}."
            )
        if self.vllm_importance_sampling_correction and low is None and high is None:
            raise ValueError(
                "vllm_importance_sampling_clip_min and vllm_importance_sampling_clip_max are both None, so the "
                f"correction {self.vllm_importance_sampling_mode!r} has no bound: set at least one of them, or "
                "vllm_importance_sampling_correction=False."
            )
        if self.use_vllm and self.vllm_importance_sampling_correction and self._reshaping:
            warnings.warn(
                f"{', '.join(self._reshaping)} changes the distribution that tokens are sampled from, and the trainer "
                "scores them under the unchanged one: sampler correction is off in this run. Set "
                "vllm_importance_sampling_correction=False to say so yourself.",
                UserWarning,
                stacklevel=4,
            )
            self.vllm_importance_sampling_correction = False

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may go below and above 1."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high


class PolicyGradientTrainer(OnlineTrainer):
    """The base of trainers whose rows have advantages. A subclass has `advantages` and `objective`."""

    args: PolicyGradientConfig

    def set_up(self) -> None:
        """Weight of the experts' balance, and a reference that moves."""
        self.router_coef = _router_coefficient(self.model, self.args.router_aux_loss_coef)
        if self.args.sync_ref_model:
            self.add_callback(ReferenceSync(self))

    @abstractmethod
    def advantages(self, rewards_RF: Tensor, rollouts: Sequence[Rollout], group_size: int) -> Tensor:
        """The learning signal of every row of all ranks, shape (R,).

        Args:
            rewards_RF: Rewards by function of all ranks' rows (NaN: not scored), the `group_size` completions of a
                prompt side by side.
            rollouts: This rank's rows.
            group_size: Completions of each prompt.
        """

    def credit(self, rollouts: Sequence[Rollout], group_size: int, real: int) -> dict[str, float]:
        """Advantages from rewards."""
        if self.args.mask_truncated_completions:
            for rollout in rollouts:
                rollout.in_loss = rollout.in_loss and not rollout.truncated
        rewards_RF = self.reward_table(rollouts)
        every_RF = self.accelerator.gather(rewards_RF)
        counts = torch.arange(len(rollouts), device=self.accelerator.device) < real
        counts_R = self.accelerator.gather(counts)
        # Rows that fill up have no part in what is normalized over all of them.
        advantages_R = self.advantages(every_RF.where(counts_R.unsqueeze(1), torch.nan), rollouts, group_size)
        first = self.accelerator.process_index * len(rollouts)
        for rollout, advantage in zip(rollouts, advantages_R[first : first + len(rollouts)].tolist(), strict=True):
            rollout.advantage = advantage
        return reward_metrics(every_RF[counts_R], self.reward_weights_F, self.rewards.names, group_size)

    @property
    def needs_old_logps(self) -> bool:
        """Where a generation batch is consumed by one optimizer step, the old policy is the present one."""
        return self.args.gradient_accumulation_steps % (self._steps_per_generation * self._iterations) != 0

    @property
    def _iterations(self) -> int:
        return self.args.num_iterations

    def scoring_options(self) -> dict[str, Any]:
        """What the loss needs of a forward pass."""
        return {"entropies": True, "router_loss": bool(self.router_coef)}

    def correct_sampler(self, old_logps: Tensor, batch: MicroBatch, tally: Tally) -> Tensor | None:
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

    def add_router_loss(self, loss: Tensor, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:
        """The loss with a mixture of experts' balance, where that is asked for."""
        if output.router_loss is None:
            return loss
        tally.mean("aux_loss", output.router_loss)
        share = len(batch.rollouts) * batch.totals.ranks / batch.totals.rows
        return loss + self.router_coef * output.router_loss * share

    def _extra_state(self) -> dict[str, Any]:
        if not self.args.sync_ref_model:
            return {}
        return {"reference": self.accelerator.unwrap_model(self.reference).state_dict()}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        if self.args.sync_ref_model:
            self.accelerator.unwrap_model(self.reference).load_state_dict(state["reference"])


def tally_clipping(tally: Tally, low: Tensor, high: Tensor, counts: Tensor) -> None:
    """Where the clip took the gradient away (0/1), of tokens or of rows."""
    tally.mean("clip_ratio/low_mean", low, counts)
    tally.mean("clip_ratio/high_mean", high, counts)
    tally.mean("clip_ratio/region_mean", low + high, counts)


def tally_clipping_extrema(tally: Tally, low_B: Tensor, high_B: Tensor, counts_B: Tensor) -> None:
    """The smallest and the largest share of a row."""
    tally.min("clip_ratio/low_min", low_B, counts_B)
    tally.max("clip_ratio/high_max", high_B, counts_B)


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
