"""REINFORCE Leave-One-Out (https://arxiv.org/abs/2402.14740)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.checks import number
from slipstream.config import option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.modeling.packing import loss_mask
from slipstream.modeling.sending import sent
from slipstream.objectives.advantages import combine_rewards
from slipstream.objectives.rloo import leave_one_out_advantages, sequence_surrogate, shaped_rewards
from slipstream.objectives.segments import row_sum
from slipstream.records import MicroBatch, Rollout
from slipstream.trainers.metrics import Tally
from slipstream.trainers.policy_gradient import (
    PolicyGradientConfig,
    PolicyGradientTrainer,
    tally_clipping,
    tally_clipping_extrema,
)


@dataclass
class RLOOConfig(PolicyGradientConfig):
    """Configuration of `RLOOTrainer`; what it shares with GRPO is in `PolicyGradientConfig`, with all in
    `OnlineConfig`."""

    num_generations: int = option(2, "Completions sampled for each prompt.")
    beta: float = option(0.05, "Weight of the KL penalty in the reward; 0.0 loads no reference model.")
    normalize_advantages: bool = option(False, "Give the advantages of a generation batch mean 0 and std 1.")
    reward_clip_range: tuple[float, float] | None = option(None, "Lowest and highest reward, before the KL penalty.")

    def _check_values(self) -> None:
        super()._check_values()
        if self.reward_clip_range is None:
            return
        if not isinstance(self.reward_clip_range, tuple | list) or len(self.reward_clip_range) != 2:
            raise ValueError(
                f"reward_clip_range={self.reward_clip_range!r} is not allowed: it must be the lowest and the highest "
                "reward, such as (-1.0, 1.0), or None."
            )
        low, high = self.reward_clip_range
        number("reward_clip_range[0]", low)
        number("reward_clip_range[1]", high, above=low)
        self.reward_clip_range = (low, high)


class RLOOTrainer(PolicyGradientTrainer):
    """REINFORCE Leave-One-Out (https://arxiv.org/abs/2402.14740): a completion is one action, its baseline the mean
    reward of the prompt's other completions, and the KL penalty a part of its reward.

    Arguments are those of `OnlineTrainer`.

    The KL penalty needs log-probabilities under the policy that sampled. Where that is the present policy, they come
    from the forward pass of the training step itself; `normalize_advantages=True`, or groups that do not fit into a
    micro-batch (`per_device_train_batch_size` is no multiple of `num_generations`), take one more pass.

    Example:
        ```python
        trainer = RLOOTrainer("Qwen/Qwen3-0.6B", accuracy_reward, RLOOConfig("out", use_vllm=True), dataset)
        trainer.train()
        ```
    """

    config_class = RLOOConfig
    args: RLOOConfig

    @property
    def keeps_groups(self) -> bool:
        """So that a row's KL is known when its group's advantages are made."""
        args = self.args
        fits = args.micro_batch_rows % args.num_generations == 0
        return bool(args.beta) and fits and not args.normalize_advantages

    @property
    def needs_old_logps(self) -> bool:
        """For the ratio, or for a KL that must be known before the training step."""
        return super().needs_old_logps or (bool(self.args.beta) and not self.keeps_groups)

    def advantages(self, rewards_RF: Tensor, rollouts: Sequence[Rollout], group_size: int) -> Tensor:
        """What each reward, less its KL penalty where that is known by now, is above the others of its group."""
        args, kl_R = self.args, None
        if args.beta and self.needs_old_logps:
            device = self.accelerator.device
            parts = [loss_mask(r).to(device) * (r.extra["old_logps"] - r.extra["ref_logps"]) for r in rollouts]
            kl_R = self.accelerator.gather(torch.stack([part.sum() for part in parts]))
        rewards_R = combine_rewards(rewards_RF, self.reward_weights_F)
        shaped_R = shaped_rewards(rewards_R, kl_R, args.beta, args.reward_clip_range)
        return leave_one_out_advantages(shaped_R, group_size, args.normalize_advantages)

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The mean over rows of the clipped ratio of whole completions times their advantages."""
        args, logps, mask, owner, rows = self.args, output.logps_N, batch.mask_N, batch.rows_N, len(batch.rollouts)
        old_logps = batch.per_token.get("old_logps", logps.detach())
        advantages_B = batch.advantages_B
        if args.beta:
            kl_N = old_logps - batch.per_token["ref_logps"]
            tally.mean("kl", kl_N, mask)
            if not self.needs_old_logps:
                advantages_B = advantages_B + self._advantages_of_kl(row_sum(kl_N * mask, owner, rows), batch)
        correction = self.correct_sampler(old_logps, batch, tally)
        loss_B, low_B, high_B = sequence_surrogate(
            logps - old_logps, advantages_B, mask, owner, *args.clip_range, correction
        )
        counts_B = (row_sum(mask, owner, rows) > 0).to(mask.dtype)
        tally_clipping(tally, low_B, high_B, counts_B)
        tally_clipping_extrema(tally, low_B, high_B, counts_B)
        if output.entropies_N is not None:
            tally.mean("entropy", output.entropies_N, mask)
        loss = loss_B.sum() * batch.totals.ranks / batch.totals.rows
        return self.add_router_loss(loss, output, batch, tally)

    def _advantages_of_kl(self, kl_B: Tensor, batch: MicroBatch) -> Tensor:
        """The part of the KL penalty in the advantages, which are linear in the rewards."""
        scored: list[Any] = [any(reward is not None for reward in r.rewards) for r in batch.rollouts]
        penalty_B = torch.where(sent(torch.tensor(scored), kl_B.device), -self.args.beta * kl_B, torch.nan)
        return leave_one_out_advantages(penalty_B, batch.group_size)
