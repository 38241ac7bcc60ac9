"""Entropy in GRPO's loss: which tokens it is made of, and a bonus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.checks import number
from slipstream.config import option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.modeling.packing import loss_mask
from slipstream.records import MicroBatch, Rollout
from slipstream.trainers.metrics import Tally
from slipstream.trainers.policy_gradient import PolicyGradientConfig, PolicyGradientTrainer


@dataclass
class EntropyConfig(PolicyGradientConfig):
    """Settings of the entropy mask and the entropy bonus."""

    top_entropy_quantile: float = option(1.0, "Train on this share of tokens, those of highest entropy.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    use_adaptive_entropy: bool = option(False, "Adapt that weight towards entropy_target.")
    entropy_coef_min: float = option(0.0, "Its lower bound.")
    entropy_coef_max: float = option(1.0, "Its upper bound.")
    entropy_coef_delta: float = option(0.005, "Its change in each optimizer step.")
    entropy_target: float = option(0.2, "The entropy aimed at.")

    def _check_values(self) -> None:
        super()._check_values()
        number("top_entropy_quantile", self.top_entropy_quantile, above=0, most=1)
        for name in ("entropy_coef", "entropy_coef_min", "entropy_coef_delta", "entropy_target"):
            number(name, getattr(self, name), least=0)
        number("entropy_coef_max", self.entropy_coef_max, least=self.entropy_coef_min)


class EntropyTrainer(PolicyGradientTrainer):
    """A trainer with an entropy mask (https://arxiv.org/abs/2506.01939) and an entropy bonus, fixed or adaptive."""

    args: EntropyConfig

    def set_up(self) -> None:
        """The bonus starts with the weight that is configured."""
        super().set_up()
        self.entropy_coef = self.args.entropy_coef
        # Above any target, so that an adaptive bonus waits for the first measurement.
        self.last_entropy = math.inf

    def prepare(self, model: nn.Module, rollouts: Sequence[Rollout]) -> None:
        """Choose the tokens that enter the loss."""
        if self.args.top_entropy_quantile < 1:
            self._annotate(model, rollouts, "entropies", entropies=True)
            masks = [loss_mask(r).to(self.accelerator.device) > 0 for r in rollouts]
            threshold = self._entropy_threshold(
                [r.extra["entropies"][kept] for r, kept in zip(rollouts, masks, strict=True)]
            )
            for rollout in rollouts:
                rollout.extra["entropy_mask"] = (rollout.extra["entropies"] >= threshold).float()
            for rollout in rollouts:  # one that is learnt from twice in a step is there twice
                rollout.extra.pop("entropies", None)

    def _entropy_threshold(self, entropies: Sequence[Tensor]) -> Tensor:
        """The entropy that a share of `top_entropy_quantile` of all ranks' tokens reach; -inf where there is none."""
        accelerator, nothing = self.accelerator, -math.inf
        own = torch.cat([*entropies, torch.empty(0, device=accelerator.device)]).unsqueeze(0)
        # No number pads them that a token may have: rounding puts the entropy of a sure one a little below 0.
        padded = accelerator.pad_across_processes(own, dim=1, pad_index=nothing)
        every = accelerator.gather(padded).flatten()
        ordered = every[every > nothing].sort().values
        if not len(ordered):
            return torch.tensor(nothing, device=accelerator.device)
        # torch.quantile refuses more than 2**24 values.
        place = (1 - self.args.top_entropy_quantile) * (len(ordered) - 1)
        below = int(place)
        return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)

    def scoring_options(self) -> dict[str, Any]:
        """What the loss needs of a forward pass."""
        return super().scoring_options() | {"entropy_gradient": self._has_bonus}

    @property
    def _has_bonus(self) -> bool:
        return bool(self.args.entropy_coef) or self.args.use_adaptive_entropy

    def add_bonus(self, loss: Tensor, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:
        """The loss less the bonus, if there is one: the mean entropy of the tokens that the loss is made of."""
        if not self._has_bonus:
            return loss
        assert output.entropies_N is not None  # scoring_options asks for them
        coefficient = self.entropy_coef
        if self.args.use_adaptive_entropy and self.last_entropy > self.args.entropy_target:
            coefficient = 0.0
        mask = batch.mask_N * batch.per_token.get("entropy_mask", torch.ones_like(batch.mask_N))
        bonus = (output.entropies_N * mask).sum() * batch.totals.ranks / batch.totals.chosen_tokens
        tally.mean("entropy/chosen", output.entropies_N, mask)
        return loss - coefficient * bonus

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
        return super()._extra_state() | {"entropy_coef": self.entropy_coef, "last_entropy": self.last_entropy}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        super()._load_extra_state(state)
        self.entropy_coef, self.last_entropy = state["entropy_coef"], state["last_entropy"]
